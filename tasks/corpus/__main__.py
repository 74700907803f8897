"""The `corpus` stage: a named corpus becomes tokenised, deduplicated Arrow shards: train, validation and test.

    python -m tasks.corpus.fingerprint NAME
    python -m tasks.corpus NAME       # writes data/corpora/NAME/, NAME.json and NAME.lengths.csv

Needs data/models/MODEL, whose tokenizer the corpus uses. Killed at any point, it continues and gives the same bytes.

On machines that share the project's folder, phase by phase, before the command above publishes the result:

    python -m tasks.corpus NAME --phase scan --task-index $SLURM_ARRAY_TASK_ID --num-tasks 64
    python -m tasks.corpus NAME --phase resolve
    python -m tasks.corpus NAME --phase tokenise --task-index $SLURM_ARRAY_TASK_ID --num-tasks 64
"""

from __future__ import annotations

import argparse
import sys
import time

from tasks.corpus import fingerprint
from tasks.corpus.prepare import planning, stage


def main() -> int:
    """Run the stage, or a share of one of its phases, for the corpus named on the command line."""
    arguments = _arguments()
    name, began = arguments.corpus, time.perf_counter()
    try:
        if arguments.phase:
            units = stage.run_share(name, phase=arguments.phase, index=arguments.task_index, count=arguments.num_tasks)
            print(f"corpus {name}: {arguments.phase}: {units} units in {time.perf_counter() - began:.1f} s")
            return 0
        metrics = stage.make(name, run=stage.processes(arguments.workers))
    except stage.FAILURES as error:
        print(f"corpus {name}: {error}", file=sys.stderr)
        return 1
    print(
        f"corpus {name}: {metrics['documents']:,} documents, {metrics['tokens']:,} tokens "
        f"in {time.perf_counter() - began:.1f} s -> {fingerprint.CORPORA / name}"
    )
    return 0


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m tasks.corpus",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("corpus", help="a corpus of pipelines.yaml")
    parser.add_argument("--workers", type=int, help="processes on this machine (default: one for each core)")
    parser.add_argument("--phase", choices=planning.PHASES, help="run a share of this phase only")
    parser.add_argument("--task-index", type=int, default=0, help="which share, from 0")
    parser.add_argument("--num-tasks", type=int, default=1, help="how many shares there are")
    arguments = parser.parse_args()
    if arguments.workers is not None and arguments.workers < 1:
        parser.error(f"--workers {arguments.workers} must be at least 1")
    if not 0 <= arguments.task_index < arguments.num_tasks:
        parser.error(f"--task-index {arguments.task_index} is not one of 0 to {arguments.num_tasks - 1}")
    if arguments.num_tasks > 1 and not arguments.phase:
        parser.error("--num-tasks needs --phase: which phase to share")
    if arguments.num_tasks > 1 and arguments.phase == "resolve":
        parser.error("--phase resolve is one unit; run it once, without --num-tasks")
    return arguments


if __name__ == "__main__":
    sys.exit(main())
