"""What a corpus holds: domains, splits, shards and counts, and the one number that names all of it."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from tasks.corpus.tokenizer import encoder

FORMAT = 3
FILE = "manifest.json"
Split = Literal["train", "validation", "test"]
SPLITS: tuple[Split, ...] = get_args(Split)
"""Disjoint sets of documents. What is decided, is decided on `validation`; only tasks/evaluate reads `test`."""


@dataclass(frozen=True, kw_only=True)
class Shard:
    """One Arrow file, as its sidecar describes it. `path` is relative to the corpus; `size` is the file's bytes."""

    path: str
    size: int
    documents: int
    tokens: int
    text_bytes: int
    min_id: int
    max_id: int
    first_ids: tuple[int, ...]
    first_doc_id: str
    last_doc_id: str
    sha256: str
    xxh3_128: str
    task_key: str


@dataclass(frozen=True, kw_only=True)
class SplitManifest:
    """The shards of a split, in order. `bytes` counts UTF-8 bytes of its texts; `tokens` includes the separators."""

    shards: tuple[Shard, ...]
    documents: int
    tokens: int
    bytes: int


@dataclass(frozen=True, kw_only=True)
class DomainManifest:
    """One domain. `rules` counts records: read, kept, and those dropped by each rule.

    `files` are verdicts and rejects (tokenise.py): path in the corpus -> sha256. Of an `unseen` one all is test text.
    """

    train: SplitManifest
    validation: SplitManifest
    test: SplitManifest
    rules: dict[str, int]
    license: str
    source: str
    files: dict[str, str]
    unseen: bool = False

    @property
    def splits(self) -> dict[str, SplitManifest]:
        """The sets of documents by their names."""
        return {split: getattr(self, split) for split in SPLITS}

    @property
    def tokens(self) -> int:
        """Tokens of all sets, separators included."""
        return sum(part.tokens for part in self.splits.values())

    @property
    def bytes_per_token(self) -> float:
        """UTF-8 bytes of text per token, over all sets."""
        return round(sum(part.bytes for part in self.splits.values()) / self.tokens, 4)


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """A corpus. `sha256` names everything in it; `tokenizer` is the fingerprint of the encoder that made its ids."""

    corpus: str
    model: str
    tokenizer: str
    vocab_size: int
    eos_token_id: int
    bos_token_id: int | None
    separators: str
    dtype: str
    seed: int
    domains: dict[str, DomainManifest]
    sha256: str

    @property
    def trained(self) -> dict[str, DomainManifest]:
        """The domains that stages may read, weigh and train on: all but the unseen ones."""
        return {name: domain for name, domain in self.domains.items() if not domain.unseen}

    @property
    def unseen(self) -> dict[str, DomainManifest]:
        """The domains on which the result is judged and nothing else."""
        return {name: domain for name, domain in self.domains.items() if domain.unseen}


def load(corpus_dir: Path) -> Manifest:
    """Read the manifest of a corpus. Raises ValueError naming the file and the fix."""
    path = corpus_dir / FILE
    if not path.exists():
        raise ValueError(f"{path}: not found; make the corpus with `python -m tasks.corpus {corpus_dir.name}`")
    content = path.read_bytes()
    raw = json.loads(content)
    if raw.pop("format") != FORMAT:
        raise ValueError(f"{path}: not of format {FORMAT}; make the corpus again")
    domains = {name: _domain(entry) for name, entry in raw.pop("domains").items()}
    return Manifest(**raw, domains=domains, sha256=hashlib.sha256(content).hexdigest())


def require_tokenizer(manifest: Manifest, model_dir: Path) -> None:
    """Raise ValueError if a model's tokenizer would give other ids than those of the shards."""
    own = encoder.load_encoder(model_dir).fingerprint
    if not encoder.same_ids(own, manifest.tokenizer):
        raise ValueError(
            f"{model_dir}: its tokenizer is {own}, but corpus {manifest.corpus} was tokenised with "
            f"{manifest.tokenizer} (model {manifest.model}); use that model, or make a corpus entry for this one"
        )


def split_of(shards: list[dict[str, Any]]) -> dict[str, Any]:
    """The manifest entry of one split, from its sidecars."""
    return {
        "shards": shards,
        "documents": sum(shard["documents"] for shard in shards),
        "tokens": sum(shard["tokens"] for shard in shards),
        "bytes": sum(shard["text_bytes"] for shard in shards),
    }


def _domain(raw: dict[str, Any]) -> DomainManifest:
    splits: dict[str, Any] = {split: _split(raw[split]) for split in SPLITS}
    return DomainManifest(**{**raw, **splits})


def _split(raw: dict[str, Any]) -> SplitManifest:
    shards = tuple(Shard(**{**shard, "first_ids": tuple(shard["first_ids"])}) for shard in raw["shards"])
    return SplitManifest(**{**raw, "shards": shards})
