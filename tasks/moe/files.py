"""The files of a checkpoint folder: weights as safetensors, config, generation config, tokenizer, card and licence.

Config and tokenizer are written so that transformers 4 and 5 read the same from them (docs/model.md).
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tasks import architectures
from tasks.moe.internals import rope

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

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
_TOKENIZER_5 = ("backend", "is_local", "local_files_only")
"""Fields of tokenizer_config.json that say where transformers 5 found the tokenizer."""
DOCUMENTS = ("README.md", "LICENSE*", "LICENCE*", "NOTICE*", "USE_POLICY*")


def save(model: PreTrainedModel, folder: Path) -> None:
    """Write weights and configs into an existing folder, readable by all (safetensors itself writes mode 0600)."""
    model.save_pretrained(folder)
    write_config(model.config, folder)
    for file in folder.glob("*.safetensors"):
        file.chmod(0o644)


def config_fields(config: PreTrainedConfig) -> dict[str, Any]:
    """Content of config.json: what transformers 5 writes, and the names under which transformers 4 looks for the same.

    transformers 4 reads `rope_theta`, `rope_scaling` and `torch_dtype`, and takes its own defaults, without a word,
    where they are missing. transformers 5 takes `rope_scaling` before `rope_parameters`; both say the same here.
    """
    fields: dict[str, Any] = json.loads(config.to_json_string())
    if (row := architectures.SPARSE.get(config.model_type)) is not None:
        fields |= {name: fields[other] for name, other in row.names_in_4.items()}
    if "dtype" in fields:
        fields["torch_dtype"] = fields["dtype"]
    return fields | _rope_fields(config)


def _rope_fields(config: Any) -> dict[str, Any]:
    """The rotary embedding under the names of both, with what they would derive from other fields in numbers."""
    scaling = dict(config.rope_parameters)
    original = scaling.get("original_max_position_embeddings")
    if "factor" in scaling and scaling["factor"] is None and original:
        scaling["factor"] = config.max_position_embeddings / original
    fields: dict[str, Any] = {}
    if scaling["rope_type"] == "longrope":
        # transformers 4 looks for the original length beside `rope_scaling`, and derives the factor from it.
        fields["original_max_position_embeddings"] = original
        scaling["attention_factor"] = rope.frequencies(config)[1]
    fields["rope_parameters"] = dict(scaling)
    for name in ("rope_theta", "partial_rotary_factor"):
        if name in scaling:
            fields[name] = scaling.pop(name)
    return fields | {"rope_scaling": None if scaling["rope_type"] == "default" else scaling}


def write_config(config: PreTrainedConfig, folder: Path) -> None:
    """Write config.json for transformers 4 and 5 into an existing folder."""
    text = json.dumps(config_fields(config), indent=2, sort_keys=True)
    (folder / "config.json").write_text(text + "\n")


def copy_tokenizer(source: Path, target: Path) -> None:
    """Copy the tokenizer and the generation config of one checkpoint folder to another.

    Byte for byte, except for a tokenizer_config.json that transformers 4 could not load.
    """
    for name in (*TOKENIZER_FILES, "generation_config.json"):
        if (source / name).is_file():
            shutil.copyfile(source / name, target / name)
    share_tokenizer(target)


def share_tokenizer(folder: Path) -> None:
    """Give a tokenizer_config.json of transformers 5 the names that transformers 4 has for the same.

    transformers 4 knows no class `TokenizersBackend` and no list of `extra_special_tokens`. Transformers 5 reads the
    older names as well, and the ids stay the same. Raises ValueError for a file that is not a JSON object.
    """
    path = folder / "tokenizer_config.json"
    if not path.is_file():
        return
    fields = read_json(path)
    shared = {name: value for name, value in fields.items() if name not in _TOKENIZER_5}
    if shared.get("tokenizer_class") == "TokenizersBackend":
        shared["tokenizer_class"] = "PreTrainedTokenizerFast"
        shared.setdefault("model_input_names", ["input_ids", "attention_mask"])  # 4 adds token_type_ids otherwise
    if isinstance(shared.get("extra_special_tokens"), list):
        shared["additional_special_tokens"] = shared.pop("extra_special_tokens")
    if shared != fields:
        path.write_text(json.dumps(shared, indent=2, ensure_ascii=False) + "\n")


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in a file. Raises ValueError, naming the file, for anything else."""
    try:
        fields = json.loads(path.read_text(encoding="utf-8"))
    except RecursionError:
        raise ValueError(f"{path.name} is not valid JSON: it is nested too deeply; fetch it again") from None
    except ValueError as error:
        raise ValueError(f"{path.name} is not valid JSON: {error}; fetch it again") from None
    if not isinstance(fields, dict):
        raise ValueError(f"{path.name} holds a JSON {type(fields).__name__}, not an object; fetch it again")
    return fields


def copy_documents(source: Path, target: Path) -> None:
    """Copy the model card and the licence of one checkpoint folder to another, byte for byte."""
    for pattern in DOCUMENTS:
        for file in sorted(source.glob(pattern)):
            shutil.copyfile(file, target / file.name)
