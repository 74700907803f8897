"""Compare methods of domain weights by what a model trained with them is worth.

    python -m tasks.mixture.compare FOLDER --corpus data/corpora/wide
    python -m tasks.mixture.compare FOLDER --pipeline demo --methods uniform proportional dynamic

Each method's weights come from the stage `mixture`, which runs in FOLDER as in any project. A model is trained with
them for every seed and judged on test text, of the domains and of those that it was never trained on: at equal tokens,
and at equal total cost, where uniform and proportional shares are trained on as many tokens more as the estimate cost.

With --corpus a small LLaMA from scratch is trained, in a tokenizer cut to its first merges, so that a run takes
seconds; with --pipeline the split model of a pipeline whose stage `partition` has run, by the pipeline's own settings.

Each training is a file in FOLDER/cells, committed by a rename: the same command goes on after any kill, and with more
methods or seeds adds to what is there. FOLDER/compare.json has all figures.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tasks import scratch
from tasks.corpus import manifest
from tasks.mixture.compare import cells, estimates, ground, table
from tasks.mixture.compare.cells import Cell
from tasks.mixture.compare.estimates import BASELINES, DYNAMIC, TARGET, Wanted
from tasks.mixture.compare.ground import Ground
from tasks.settings.mixture import MEAN

ROUND_TO = 4
"""Budgets of the baselines at equal cost are rounded up to a quarter of a training, so that estimates share them."""
FILE = "compare.json"
Results = dict[int, Any]
"""{seed: a cell's result}"""


class Comparison:
    """The trainings of a ground, method by method."""

    def __init__(
        self,
        on: Ground,
        *,
        seeds: Sequence[int],
        proxy: tuple[int, int],
        jobs: int,
        once: bool,
        target: str = MEAN,
    ) -> None:
        """Args:
        proxy: tokens of a proxy, and units of a swarm.
        once: all seeds train with the first one's estimate.
        target: the domain whose loss is to fall, or the mean of all.

        Raises:
            ValueError: the target is no trained domain.
        """
        if target != MEAN and target not in on.domains:
            raise ValueError(f"--target {target}: not a domain that is trained on; those are {', '.join(on.domains)}")
        self.ground, self.seeds, self.proxy, self.jobs, self.once = on, list(seeds), proxy, jobs, once
        self.tokens, self.target = on.params.tokens, target

    @property
    def baselines(self) -> tuple[str, ...]:
        """What a method is held to at equal cost."""
        return BASELINES if self.target == MEAN else (*BASELINES, TARGET)

    def mixtures(self, method: str, tokens: int) -> dict[int, Path]:
        """mixture.json of a method for each seed."""
        wanted = {
            seed: Wanted(method=method, seed=self.seeds[0] if self.once else seed, tokens=tokens, target=self.target)
            for seed in self.seeds
        }
        proxy_tokens, units = self.proxy
        made = estimates.run(self.ground, wanted.values(), proxy_tokens=proxy_tokens, units=units)
        return {seed: made[each] for seed, each in wanted.items()}

    def trained(self, method: str, tokens: int) -> Results:
        """The results of a method at a budget, by seed."""
        mixtures = self.mixtures(method, tokens)
        if method == DYNAMIC:
            every = [
                cells.dynamic(seed, tokens, mixture=path, references=self._references(seed))
                for seed, path in mixtures.items()
            ]
        else:
            every = [Cell(method=method, seed=seed, tokens=tokens, mixture=path) for seed, path in mixtures.items()]
        results = dict(zip(mixtures, cells.run(self.ground, every, jobs=self.jobs), strict=True))
        if self.target == MEAN:
            return results
        return {
            seed: {**result, "target": {self.target: result["heldout"][self.target]}}
            for seed, result in results.items()
        }

    def cost(self, method: str) -> float:
        """What a method costs before training, in tokens of the training: the dearest seed's."""
        if method == DYNAMIC:
            return self._reference_cost()
        paths = set(self.mixtures(method, self.tokens).values())
        return max(estimates.cost(self.ground, path) for path in paths) * self.tokens

    def baseline_tokens(self, cost: float) -> int:
        """What the baselines train on when a method has cost so many tokens."""
        quarter = self.tokens / ROUND_TO
        return round(self.tokens + quarter * -(-cost // quarter))

    def equal_tokens(self, method: str) -> dict[str, Any]:
        """The row of a method, against uniform shares."""
        results = self.trained(method, self.tokens)
        against = {} if method == "uniform" else {"uniform": self.trained("uniform", self.tokens)}
        return table.row(method, results, against)

    def equal_cost(self, method: str) -> dict[str, Any]:
        """The row of a method whose estimate costs something."""
        cost = self.cost(method)
        tokens = self.baseline_tokens(cost)
        rivals = {name: self.trained(name, tokens) for name in self.baselines}
        made = table.row(method, self.trained(method, self.tokens), rivals)
        return {**made, "cost": cost, "baseline_tokens": tokens}

    def _references(self, seed: int) -> Any:
        """What dynamic batch loading is to reach: the parent's losses, or from scratch those of a uniform run."""
        if self.ground.has_parent:
            return "parent"
        return self.trained("uniform", self.tokens)[seed]["validation"]

    def _reference_cost(self) -> float:
        """A uniform run, or a forward pass of the parent, which is a third of a training step."""
        params = self.ground.params
        if not self.ground.has_parent:
            return float(self.tokens)
        return params.eval_windows * len(self.ground.domains) * params.seq_len / 3


def run(comparison: Comparison, methods: Sequence[str]) -> dict[str, Any]:
    """Run and write FOLDER/compare.json, after each method anew; return its content.

    A method that fails is named in `failed`, with the reason; the others go on.
    """
    on = comparison.ground
    content: dict[str, Any] = {
        "what": on.what,
        "seeds": comparison.seeds,
        "tokens": comparison.tokens,
        "windows": on.windows,
        "estimates": "one" if comparison.once else "by seed",
        "unseen": sorted(manifest.load(on.folder / on.corpus).unseen),
        "target": None if comparison.target == MEAN else comparison.target,
        "equal_tokens": [],
        "equal_cost": [],
        "failed": {},
    }
    for method in methods:
        try:
            content["equal_tokens"].append(comparison.equal_tokens(method))
            if comparison.cost(method) > 0:
                content["equal_cost"].append(comparison.equal_cost(method))
        except ValueError as error:
            content["failed"][method] = str(error)
            print(f"compare: {method}: {error}", file=sys.stderr, flush=True)
        scratch.write_json(on.folder / FILE, content)
    print(table.markdown(content), flush=True)
    return content


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m tasks.mixture.compare",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("folder", type=Path, help="where everything is kept")
    where = parser.add_mutually_exclusive_group(required=True)
    where.add_argument("--corpus", type=Path, help="a tokenised corpus, for a small model from scratch")
    where.add_argument("--pipeline", help="a pipeline whose split model is trained")
    parser.add_argument("--unseen", nargs="+", default=[], metavar="DOMAIN", help="hold these domains out (--corpus)")
    parser.add_argument(
        "--target", default=MEAN, metavar="DOMAIN", help="whose loss the estimates are to lower; the mean if absent"
    )
    parser.add_argument("--methods", nargs="+", default=estimates.known(), choices=estimates.known(), metavar="METHOD")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--tokens", type=int, default=262_144, help="of one training")
    parser.add_argument("--proxy-tokens", type=int, help="of one training of a proxy; a quarter of --tokens if absent")
    parser.add_argument("--units", type=int, default=24, help="trainings of a swarm")
    parser.add_argument("--once", action="store_true", help="estimate with the first seed alone, for all seeds")
    parser.add_argument("--jobs", type=int, default=2, help="trainings at a time, each on a core")
    arguments = parser.parse_args(argv)
    if arguments.pipeline and arguments.unseen:
        parser.error("--unseen goes with --corpus; a pipeline's corpus has its own")
    folder = arguments.folder.resolve()
    seeds, tokens = list(dict.fromkeys(arguments.seeds)), arguments.tokens
    try:
        with scratch.workspace("compare", scratch.fingerprint(str(folder))):
            if arguments.pipeline:
                on = ground.student(folder, pipeline=arguments.pipeline, seeds=seeds, tokens=tokens)
            else:
                on = ground.scratch_model(
                    folder, corpus=arguments.corpus, unseen=arguments.unseen, seeds=seeds, tokens=tokens
                )
            proxy = arguments.proxy_tokens or tokens // 4, arguments.units
            comparison = Comparison(
                on, seeds=seeds, proxy=proxy, jobs=arguments.jobs, once=arguments.once, target=arguments.target
            )
            failed = run(comparison, arguments.methods)["failed"]
    except (ValueError, OSError, scratch.BusyError) as error:
        print(f"compare: {error}", file=sys.stderr)
        return 1
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
