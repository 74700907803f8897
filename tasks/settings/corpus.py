"""The section `corpora`: where text comes from, what is dropped, and how it becomes shards."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Annotated, Literal, Self

from pydantic import AfterValidator, Field, model_validator

from tasks import plugin, sources
from tasks.settings.fields import Frozen, Name, Positive, Seed, Sha256, Share
from tasks.settings.filters import Filter


def _source(text: str) -> str:
    sources.parse(text)
    return text


HeldOut = Annotated[float, Field(gt=0, lt=1)]  # nothing could be judged on no text
SourceText = Annotated[str, AfterValidator(_source)]


if TYPE_CHECKING:
    Format = Literal["text", "jsonl", "parquet", "mediawiki", "dataset"]
else:
    Format = Literal[("text", "jsonl", "parquet", "mediawiki", "dataset", *plugin.having("reader"))]


class OwnNearDuplicates(Frozen):
    """How a domain departs from the corpus's `near_duplicates`."""

    digits: bool


class Domain(Frozen):
    """One domain of a corpus."""

    source: SourceText
    format: Format
    license: str
    sha256: Sha256 | None = None
    sdist: bool = False
    """Let pip prepare a source distribution, which runs the package's own setup.py."""
    text_field: str = "text"
    subset: str | None = None
    """dataset: the configuration of a dataset that has several."""
    split: str | None = None
    """dataset: `train` if absent."""
    heldout: HeldOut | None = None
    """Overrides the corpus-wide share of documents held out."""
    unseen: bool = False
    """All of it goes to the test split, so that the result is judged on text of a kind that no stage has seen."""
    filters: list[Filter] | None = None
    """Overrides the corpus-wide filters; [] applies none."""
    near_duplicates: OwnNearDuplicates | Literal["none"] | None = None
    """Other `digits` than the corpus's, or none: its documents are no near-duplicates of any."""

    @model_validator(mode="after")
    def _dataset(self) -> Self:
        if self.format != "dataset" and (field := next((f for f in ("subset", "split") if getattr(self, f)), None)):
            raise ValueError(f"`{field}` is an option of format `dataset`, not of `{self.format}`")
        if self.source.startswith("hub:") and self.format != "dataset":
            raise ValueError(f"source {self.source!r} is a dataset on the hub: set format: dataset")
        return self

    @model_validator(mode="after")
    def _unseen(self) -> Self:
        if self.unseen and self.heldout is not None:
            raise ValueError(
                f"`heldout` = {self.heldout} says nothing of an `unseen` domain, all of which is; leave it out"
            )
        return self


class NearDuplicates(Frozen):
    """MinHash-LSH on word n-grams: documents that share all `rows` minima of any of `bands` bands are one cluster.

    Two documents of Jaccard similarity s meet with probability 1 - (1 - s^rows)^bands: 0.5 at s = 0.69, 0.92 at 0.8
    with the defaults, which are FineWeb's.
    """

    bands: Annotated[int, Field(gt=0, le=256)] = 14
    rows: Annotated[int, Field(gt=0, le=64)] = 8
    ngram: Positive = 5
    digits: bool = True
    """Whether digits tell documents apart. Without, each counts as 0: as in FineWeb dates and counters are alike, and
    so are arithmetic problems and price tables."""
    action: Literal["drop", "group"] = "drop"
    """drop: keep a cluster's first document. group: keep all, on the same side of the hold-out."""


class Items(Frozen):
    """Evaluation items whose text may not be trained on: JSON lines, every string of a record is looked at."""

    name: Name
    source: SourceText
    sha256: Sha256 | None = None


class Decontaminate(Frozen):
    """Drop documents that share a word n-gram with an evaluation item (13: GPT-3, arXiv 2005.14165, appendix C)."""

    items: Annotated[list[Items], Field(min_length=1)]
    ngram: Positive = 13


class Corpus(Frozen):
    """Domains, tokenised with one model's tokenizer. Of equal documents the domain named first keeps its own."""

    model: Name
    seed: Seed = 0
    heldout: HeldOut = 0.01
    """Share of documents that is not trained on: half for validation, half for test."""
    max_bad: Share = 0.001
    """Share of unreadable records above which a domain fails."""
    max_record_bytes: Positive = 1 << 26
    """Records (a line, a file, a row) larger than this are bad: nothing may fill the memory."""
    separators: Literal["eos", "bos", "bos_eos"] = "eos"
    """Control tokens around each document."""
    shard_tokens: Positive = 1 << 25
    task_bytes: Positive = 1 << 28
    """Input of one task, the unit of work that processes and machines share; what cannot be cut is one task."""
    filters: list[Filter] = Field(default_factory=list)
    keep_rejects: bool = False
    """Keep the text of filtered documents beside the reason."""
    near_duplicates: NearDuplicates | None = None
    decontaminate: Decontaminate | None = None
    domains: Annotated[dict[Name, Domain], Field(min_length=1)]

    @model_validator(mode="after")
    def _columns(self) -> Self:
        if taken := sorted({"mean", "step", "tokens"} & set(self.domains)):
            raise ValueError(
                f"domains.{taken[0]}: the metrics files have a column of that name; call the domain another"
            )
        if not self.trained:
            raise ValueError("domains: all of them are `unseen`; at least one must be trained on")
        own = [name for name, domain in self.domains.items() if isinstance(domain.near_duplicates, OwnNearDuplicates)]
        if own and self.near_duplicates is None:
            raise ValueError(
                f"domains.{own[0]}.near_duplicates: the corpus looks for none; set its near_duplicates, such as {{}}"
            )
        return self

    def other_domains(self, names: Iterable[str], *, name: str) -> str | None:
        """How `names` differ from the domains that are trained on; None if they are the same.

        Args:
            name: the corpus's.
        """
        domains = self.trained
        unknown, missing = sorted(set(names) - set(domains)), sorted(set(domains) - set(names))
        wrong = [
            f"{domain} is unseen, so nothing may be trained on it: leave it out here"
            if domain in self.unseen
            else f"{domain} not among them"
            for domain in unknown
        ]
        wrong += [f"{', '.join(missing)} missing"] if missing else []
        if not wrong:
            return None
        return f"must name exactly the domains of corpora.{name}, {', '.join(domains)}: {'; '.join(wrong)}"

    @property
    def trained(self) -> list[str]:
        """The domains that stages may read, weigh and train on: all but the unseen ones."""
        return [name for name, domain in self.domains.items() if not domain.unseen]

    @property
    def unseen(self) -> list[str]:
        """The domains on which the result is judged and nothing else."""
        return [name for name, domain in self.domains.items() if domain.unseen]

    def near_duplicates_of(self, domain: str) -> NearDuplicates | None:
        """How near-duplicates of a domain are looked for; None if they are not."""
        own = self.domains[domain].near_duplicates
        if self.near_duplicates is None or own == "none":
            return None
        return self.near_duplicates if own is None else self.near_duplicates.model_copy(update=own.model_dump())

    def parts(self) -> dict[str, Domain | Items]:
        """All that the corpus is made from, by the names of the fingerprints: `domain NAME` and `items NAME`."""
        items = self.decontaminate.items if self.decontaminate else []
        domains: dict[str, Domain | Items] = {f"domain {name}": part for name, part in self.domains.items()}
        return domains | {f"items {item.name}": item for item in items}

    def filters_of(self, domain: str) -> list[Filter]:
        """The filters that apply to a domain, in order."""
        own = self.domains[domain].filters
        return self.filters if own is None else own

    def heldout_of(self, domain: str) -> float:
        """Share of a domain's documents that is held out; 1 of an unseen one, whose documents are for test alone."""
        entry = self.domains[domain]
        if entry.unseen:
            return 1.0
        return self.heldout if entry.heldout is None else entry.heldout
