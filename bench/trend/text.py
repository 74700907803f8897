"""The text of a tokenised corpus, and a small vocabulary made from it: what grows with a model is then its body."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from tasks.corpus import manifest, shards
from tasks.corpus.manifest import Split

SPLITS: tuple[Split, ...] = ("train", "validation", "test")
END = "<|endoftext|>"
MILLION = 10**6


def write(corpus_dir: Path, folder: Path, *, tokenizer: Path, vocabulary: int, characters: int = 2_000_000) -> None:
    """Write `folder`/DOMAIN.jsonl with all documents of each domain, and `folder`/tokenizer, a byte-level BPE.

    The vocabulary is made from the first `characters` of each domain's training documents.

    Args:
        corpus_dir: what tasks/corpus wrote.
        tokenizer: the folder of the model whose tokenizer made it.
        vocabulary: ids, special ones included.

    Raises:
        ValueError: the corpus was made with another tokenizer.
    """
    from tasks.corpus.tokenizer import encoder

    made_with, given = manifest.load(corpus_dir).tokenizer, encoder.load_encoder(tokenizer).fingerprint
    if not encoder.same_ids(made_with, given):
        raise ValueError(f"{corpus_dir}: tokenizer = {made_with}, that of {tokenizer} is {given}; name its own model")
    folder.mkdir(parents=True, exist_ok=True)
    domains = list(manifest.load(corpus_dir).trained)
    for domain in domains:
        with (folder / f"{domain}.jsonl").open("w") as file:
            for split in SPLITS:
                for text in documents(corpus_dir, domain, split, tokenizer=tokenizer):
                    file.write(json.dumps({"text": text}) + "\n")
    texts = (_first(documents(corpus_dir, name, "train", tokenizer=tokenizer), characters) for name in domains)
    _vocabulary((text for part in texts for text in part), folder / "tokenizer", size=vocabulary)


def heldout(corpus_dir: Path) -> dict[str, float]:
    """The share of each domain with which a corpus of the same documents holds out the same ones.

    The first half of a document's id decides (docs/corpus.md), and the id follows from the text.
    """
    shares = {}
    for domain, entry in manifest.load(corpus_dir).trained.items():
        ids = [
            shards.doc_ids(shards.open_shard(corpus_dir / shard.path))
            for split in ("validation", "test")
            for shard in entry.splits[split].shards
        ]
        place = np.ascontiguousarray(np.concatenate(ids)).view("<u8")[:, 0] % MILLION
        shares[domain] = (int(place.max()) + 1) / MILLION
    return shares


def documents(corpus_dir: Path, domain: str, split: Split, *, tokenizer: Path) -> Iterator[str]:
    """The texts of a split, in the order of its shards, without separators."""
    from tokenizers import Tokenizer

    reader = Tokenizer.from_file(str(tokenizer / "tokenizer.json"))
    for entry in manifest.load(corpus_dir).domains[domain].splits[split].shards:
        batch = shards.open_shard(corpus_dir / entry.path)
        ids, offsets = shards.flat_ids(batch), shards.offsets(batch)
        for begin, end in itertools.pairwise(offsets):
            yield reader.decode(ids[begin:end].tolist(), skip_special_tokens=True)


def _first(texts: Iterator[str], characters: int) -> Iterator[str]:
    """Texts until `characters` are reached; the last is cut."""
    for text in texts:
        yield text[:characters]
        characters -= len(text)
        if characters <= 0:
            return


def _vocabulary(texts: Iterator[str], folder: Path, *, size: int) -> None:
    from tokenizers import ByteLevelBPETokenizer
    from transformers import PreTrainedTokenizerFast

    bpe = ByteLevelBPETokenizer()
    bpe.train_from_iterator(texts, vocab_size=size, special_tokens=[END], show_progress=False)
    PreTrainedTokenizerFast(tokenizer_object=bpe._tokenizer, bos_token=END, eos_token=END).save_pretrained(folder)
