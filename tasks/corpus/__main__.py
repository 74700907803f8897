"""The `corpus` stage: a named corpus becomes tokenised, deduplicated Arrow shards with a held-out part per domain.

    python -m tasks.corpus.fingerprint NAME
    python -m tasks.corpus NAME       # writes data/corpora/NAME/ and data/corpora/NAME.json

Needs data/models/MODEL, whose tokenizer the corpus uses. Killed at any point, it continues and gives the same bytes.
"""

from __future__ import annotations

import argparse
import shutil
import sys
import time
from pathlib import Path
from typing import Any

from tasks import scratch, settings, sources
from tasks.corpus import build, encoder, fingerprint, manifest, shards, streams
from tasks.corpus.progress import Progress
from tasks.corpus.records import CorpusError

MODELS = Path("data/models")
FAILURES = (
    settings.SettingsError,
    sources.SourceError,
    encoder.TokenizerError,
    CorpusError,
    streams.ReadError,
    scratch.BusyError,
)
"""What a person can mend; anything else is a fault of this program and shows its traceback."""


def make(name: str) -> dict[str, Any]:
    """Make corpus `name` of pipelines.yaml; returns its metrics.

    Raises:
        FAILURES: what was finished is kept for the next run.
    """
    corpus = settings.load().corpus(name)
    found = fingerprint.check(name, corpus)
    encode = encoder.load_encoder(MODELS / corpus.model)
    inputs = {"corpus": corpus.model_dump(), "sources": found, "tokenizer": encode.fingerprint}
    # Work begun by other code isn't continued; yet the code is no part of the shards, which it need not change.
    code = {path.name: scratch.digest(path) for path in sorted(Path(__file__).parent.glob("*.py"))}
    with scratch.workspace("corpus", name, inputs=[inputs, code]) as work:
        folder = work / "corpus"
        folder.mkdir(exist_ok=True)
        shards.sweep(folder)
        built = _domains(corpus, encode, work=work, key=scratch.fingerprint(inputs))
        scratch.write_json(folder / manifest.FILE, _manifest(name, corpus, encode, built=built))
        metrics = _metrics(manifest.load(folder), built)
        scratch.write_json(fingerprint.CORPORA / f"{name}.json", metrics)
        scratch.publish(folder, fingerprint.CORPORA / name)
        shutil.rmtree(work)
    return metrics


def _domains(corpus: settings.Corpus, encode: encoder.Encoder, *, work: Path, key: str) -> dict[str, build.Built]:
    seen: set[bytes] = set()
    built = {}
    with Progress(list(corpus.domains)) as progress:
        for name, domain in corpus.domains.items():
            unit = build.Unit(name=name, domain=domain, corpus=corpus, folder=work / "corpus", key=key)
            record = work / f"{name}.json"
            if before := build.finished(unit, record, seen=seen):
                built[name] = before
            else:
                built[name] = _domain(unit, encode, seen=seen, report=progress.reporter(name))
                build.finish(built[name], record)
            progress.done(name, built[name])
    return built


def _domain(unit: build.Unit, encode: encoder.Encoder, *, seen: set[bytes], report: build.Report) -> build.Built:
    domain = unit.domain
    try:
        fetched = sources.fetch(domain.source, scratch.ROOT / "sources", sha256=domain.sha256, sdist=domain.sdist)
    except sources.SourceError as error:
        raise sources.SourceError(f"domain {unit.name}: {error}") from error
    return build.Builder(unit, encode, seen=seen, report=report).run(fetched)


def _manifest(
    name: str, corpus: settings.Corpus, encode: encoder.Encoder, *, built: dict[str, build.Built]
) -> dict[str, Any]:
    """The manifest as JSON: a function of the inputs alone, so no times and no machine in it."""
    return {
        "format": manifest.FORMAT,
        "corpus": name,
        "model": corpus.model,
        "tokenizer": encode.fingerprint,
        "vocab_size": encode.vocab_size,
        "eos_token_id": encode.eos_token_id,
        "dtype": encode.dtype.__name__,
        "seed": corpus.seed,
        "domains": {
            domain: {
                **{split: manifest.split_of(made.splits[split]) for split in build.SPLITS},
                "rules": made.rules,
                "license": corpus.domains[domain].license,
                "source": corpus.domains[domain].source,
            }
            for domain, made in built.items()
        },
    }


def _metrics(made: manifest.Manifest, built: dict[str, build.Built]) -> dict[str, Any]:
    """What `dvc metrics show` shows. Rates cover what this run encoded itself; a resumed run didn't encode it all."""
    domains = {}
    for name, entry in made.domains.items():
        splits = {"train": entry.train, "heldout": entry.heldout}
        tokens = entry.train.tokens + entry.heldout.tokens
        domains[name] = {
            "documents": {split: part.documents for split, part in splits.items()},
            "tokens": {split: part.tokens for split, part in splits.items()},
            "rules": entry.rules,
            "bad": built[name].bad,
            "bytes_per_token": round((entry.train.bytes + entry.heldout.bytes) / tokens, 4),
            "seconds": round(built[name].seconds, 2),
            "tokens_per_second": round(built[name].encoded_tokens / built[name].seconds),
            "license": entry.license,
            "source": entry.source,
        }
    parts = [part for entry in made.domains.values() for part in (entry.train, entry.heldout)]
    return {
        "documents": sum(part.documents for part in parts),
        "tokens": sum(part.tokens for part in parts),
        "tokens_per_second": round(
            sum(b.encoded_tokens for b in built.values()) / sum(b.seconds for b in built.values())
        ),
        "tokenizer": made.tokenizer,
        "sha256": made.sha256,
        "domains": domains,
    }


def main() -> int:
    """Run the stage for the corpus named on the command line."""
    parser = argparse.ArgumentParser(prog="python -m tasks.corpus", description=__doc__.split("\n")[0])
    parser.add_argument("corpus", help="a corpus of pipelines.yaml")
    name = parser.parse_args().corpus
    began = time.perf_counter()
    try:
        metrics = make(name)
    except FAILURES as error:
        print(f"corpus {name}: {error}", file=sys.stderr)
        return 1
    print(
        f"corpus {name}: {metrics['documents']:,} documents, {metrics['tokens']:,} tokens "
        f"in {time.perf_counter() - began:.1f} s -> {fingerprint.CORPORA / name}"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
