"""Write the report page of a pipeline, and its checkpoint with a model card.

    python -m tasks.evaluate.report PIPELINE

Reads the metrics in runs/PIPELINE/ and data/corpora/ and loads no model. Writes runs/PIPELINE/report/index.html, which
needs no other file, and runs/PIPELINE/model/, the checkpoint to ship.
"""

from __future__ import annotations

import argparse
import shutil
import sys
from pathlib import Path

from tasks import scratch
from tasks.evaluate.report import card, page, results


def report(name: str) -> Path:
    """Write both folders of pipeline `name`; returns the page's path. Raises FileNotFoundError."""
    run = Path("runs") / name
    contents = results.read(name)
    with scratch.workspace("report", name) as folder:
        for part in ("report", "model"):
            shutil.rmtree(folder / part, ignore_errors=True)
            (folder / part).mkdir()
        (folder / "report" / "index.html").write_text(page.render(contents))
        card.write(folder / "model", contents, trained=run / "trained", heldout=run / "heldout.json")
        for part in ("report", "model"):
            scratch.publish(folder / part, run / part)
    return run / "report" / "index.html"


def main() -> int:
    """Run the stage for the pipeline named on the command line."""
    parser = argparse.ArgumentParser(prog="python -m tasks.evaluate.report", description=__doc__.split("\n")[0])
    parser.add_argument("pipeline", help="a name under `pipelines` in pipelines.yaml")
    try:
        print(report(parser.parse_args().pipeline).resolve().as_uri())
    except (ValueError, OSError, scratch.BusyError) as error:
        print(f"report: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
