"""The `sources` stage: what a corpus is made from, so that DVC re-tokenises only when that changed.

    python -m tasks.corpus.fingerprint NAME       # writes data/corpora/NAME.sources.json

Pinned packages are taken at their word (the corpus stage checks their bytes), local files are hashed, and for remote
ones the store is asked. `moeforge run --refresh` runs this stage again even if nothing in the repository changed.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from tasks import scratch, settings, sources

CORPORA = Path("data/corpora")
CACHE = scratch.ROOT / "sources"
"""Downloaded archives, and the hashes of local files."""


def fingerprints(corpus: settings.Corpus, *, anew: bool = False) -> dict[str, str]:
    """One string per domain, and per file of evaluation items, that changes when its bytes do.

    `anew` reads files again whose stamp says that they are as they were (tasks/sources/hashes.py).

    Raises:
        SourceError: names the domain or the items.
    """
    result = {}
    for name, part in corpus.parts().items():
        try:
            result[name] = sources.fingerprint(part.source, CACHE, sha256=part.sha256, anew=anew)
        except (sources.SourceError, OSError) as error:
            raise sources.SourceError(f"{name}: {error}") from error
    return result


def sources_file(name: str) -> Path:
    """Where the fingerprints of corpus `name` are kept."""
    return CORPORA / f"{name}.sources.json"


def check(name: str, corpus: settings.Corpus) -> dict[str, str]:
    """The fingerprints of a corpus, after seeing that they are those the `sources` stage wrote.

    Raises:
        SourceError: there are none, or the sources changed since; names them.
    """
    path = sources_file(name)
    if not path.exists():
        raise sources.SourceError(f"{path}: not found; run `python -m tasks.corpus.fingerprint {name}` first")
    written, now = json.loads(path.read_text()), fingerprints(corpus)
    if changed := [part for part in {**written, **now} if written.get(part) != now.get(part)]:
        raise sources.SourceError(
            f"{path}: sources changed since they were fingerprinted ({', '.join(changed)}); run again with --refresh"
        )
    return now


def main() -> int:
    """Write the fingerprints of one corpus."""
    parser = argparse.ArgumentParser(prog="python -m tasks.corpus.fingerprint", description=__doc__.split("\n")[0])
    parser.add_argument("corpus", help="a corpus of pipelines.yaml")
    name = parser.parse_args().corpus
    try:
        result = fingerprints(settings.load().corpus(name), anew=True)
        scratch.write_json(sources_file(name), result)
    except (settings.SettingsError, sources.SourceError, OSError) as error:
        print(f"corpus {name}: {error}", file=sys.stderr)
        return 1
    for part, text in result.items():
        print(f"{part}: {text}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
