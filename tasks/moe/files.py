"""The files of a checkpoint folder: weights as safetensors, config, generation config, tokenizer, card and licence."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedModel

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
)
DOCUMENTS = ("README.md", "LICENSE*", "LICENCE*", "NOTICE*", "USE_POLICY*")


def save(model: PreTrainedModel, folder: Path) -> None:
    """Write weights and configs into an existing folder, readable by all (safetensors itself writes mode 0600)."""
    model.save_pretrained(folder)
    for file in folder.glob("*.safetensors"):
        file.chmod(0o644)


def copy_tokenizer(source: Path, target: Path) -> None:
    """Copy the tokenizer and the generation config of one checkpoint folder to another, byte for byte."""
    for name in (*TOKENIZER_FILES, "generation_config.json"):
        if (source / name).is_file():
            shutil.copyfile(source / name, target / name)


def copy_documents(source: Path, target: Path) -> None:
    """Copy the model card and the licence of one checkpoint folder to another, byte for byte."""
    for pattern in DOCUMENTS:
        for file in sorted(source.glob(pattern)):
            shutil.copyfile(file, target / file.name)
