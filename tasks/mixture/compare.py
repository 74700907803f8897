"""Compare the domain weights of a pipeline with uniform and proportional shares, by models trained with each.

    python -m tasks.mixture.compare PIPELINE [--seeds 0 1 2]

Reads runs/<pipeline>/{moe/,mixture.json} and data/corpora/<corpus>/. It trains the converted model by the pipeline's
own settings, for every seed, and takes the loss on test text: of the trained domains and of those never trained on. At
equal tokens all runs read `pretrain.tokens`; at equal cost the baselines also read the tokens that the estimate cost.

Writes runs/<pipeline>/compare.json, and one file a run in runs/<pipeline>/compare/. Stopped at any moment, the same
command goes on; with more seeds it adds to the runs that are there.
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
import statistics
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from tasks import scratch, settings
from tasks.mixture import methods
from tasks.mixture.__main__ import problem_of
from tasks.settings import Pipeline

BASELINES = ("uniform", "proportional")
Run = dict[str, Any]
"""tokens, and the loss on each text: `heldout` (mean of the trained domains), `unseen` and `target`, where there are
such domains, in nats per token; `domains` has the loss of each."""


def figure(values: Sequence[float]) -> dict[str, float]:
    """Mean, standard error of the mean (NaN of one value) and number."""
    error = statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else math.nan
    return {"mean": statistics.fmean(values), "stderr": error, "n": len(values)}


def outcome(difference: Mapping[str, float], *, baseline: str) -> str:
    """Which of two is better, by more than two standard errors of their difference by seed."""
    if math.isnan(difference["stderr"]):
        return "one seed says nothing"
    if abs(difference["mean"]) <= 2 * difference["stderr"]:
        return f"no better, no worse than {baseline}"
    return f"{'better' if difference['mean'] < 0 else 'worse'} than {baseline}"


def row(runs: Sequence[Run], baselines: Mapping[str, Sequence[Run]]) -> dict[str, Any]:
    """The figures of one table: of a method's runs, and of their differences to each baseline's.

    Args:
        runs: one a seed.
        baselines: {name: runs, in the same order of seeds}. Runs of one seed read the same batches of a domain, so the
            differences are paired.

    Returns:
        {text: {mean, stderr, n, against: {baseline: {mean, stderr, n, outcome}}}, tokens, baseline_tokens}. A negative
        difference is a lower loss than the baseline's.
    """
    result: dict[str, Any] = {
        "tokens": runs[0]["tokens"],
        "baseline_tokens": next(iter(baselines.values()))[0]["tokens"],
    }
    for text in ("heldout", "unseen", "target"):
        if text not in runs[0]:
            continue
        against = {}
        for name, others in baselines.items():
            difference = figure([run[text] - other[text] for run, other in zip(runs, others, strict=True)])
            against[name] = difference | {"outcome": outcome(difference, baseline=name)}
        result[text] = {**figure([run[text] for run in runs]), "against": against}
    return result


def markdown(content: Mapping[str, Any]) -> str:
    """The tables of compare.json."""
    seeds = ", ".join(map(str, content["seeds"]))
    lines = [
        f"{content['pipeline']}: {content['method']} against {' and '.join(BASELINES)}; seeds {seeds}; nats per token."
    ]
    titles = {"equal_tokens": "equal tokens", "equal_cost": "equal cost"}
    for table, title in titles.items():
        if not (figures := content[table]):
            continue
        lines += ["", f"At {title}: {figures['tokens']:,} tokens, the baselines {figures['baseline_tokens']:,}.", ""]
        lines += [f"| text | loss | {' | '.join(f'- {name}' for name in BASELINES)} | |", "|---|---:|---:|---:|---|"]
        for text in ("heldout", "unseen", "target"):
            if own := figures.get(text):
                cells = [f"{own['mean']:.4f} ± {own['stderr']:.4f}"]
                cells += [f"{each['mean']:+.4f} ± {each['stderr']:.4f}" for each in own["against"].values()]
                outcomes = "; ".join(each["outcome"] for each in own["against"].values())
                lines.append(f"| {text} | {' | '.join(cells)} | {outcomes} |")
    return "\n".join(lines)


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """The runs of one pipeline. Paths are relative to the project's root."""

    pipeline: str
    entry: Pipeline
    work: Path
    """Keeps unfinished runs."""

    @property
    def root(self) -> Path:
        """Where the pipeline's results are."""
        return Path("runs") / self.pipeline

    def baseline(self, method: str, tokens: int, seeds: Sequence[int]) -> list[Run]:
        """Runs with the shares of a method that measures nothing, capped for so many tokens. Their shares are fixed.

        Raises:
            ValueError: the corpus has too little text for so many tokens; and as `run`.
        """
        problem = replace(problem_of(self.pipeline), weights=None, budget=tokens)
        estimate = methods.estimate(method, problem)
        mixture = self.work / f"{method}-{tokens}.json"
        scratch.write_json(mixture, {"weights": estimate.weights, "evidence": {}})
        return [self.run(mixture, seed, tokens, dynamic=None) for seed in seeds]

    def run(self, mixture: Path, seed: int, tokens: int, **update: Any) -> Run:
        """Train with the weights of a mixture.json and take the losses, unless an earlier command has.

        Raises:
            ValueError, TrainingError, OSError: what is finished is kept.
        """
        from tasks.pretrain import inputs, job
        from tasks.pretrain.launch import launcher

        params = self.entry.pretrain.model_copy(update={"tokens": tokens, "seed": seed, "trackers": (), **update})
        read = inputs.digests(self.entry, model=self.root / "moe", mixture=mixture)
        key = scratch.fingerprint({**read, "params": params.model_dump(), "code": job.code_digest()})
        target, workspace = self.root / "compare" / f"{key}.json", self.work / key
        if not target.exists():
            workspace.mkdir(exist_ok=True)
            launcher.run(
                job.Job(
                    pipeline=f"{self.pipeline}.compare",  # for logs alone; no pipeline can be called so
                    params=params,
                    corpus=Path("data/corpora") / self.entry.corpus,
                    model=self.root / "moe",
                    parent=Path("data/models") / self.entry.model,
                    mixture=mixture,
                    workspace=workspace,
                )
            )
            trained = json.loads((workspace / "pretrain.json").read_text())
            result = {"tokens": trained["tokens"], "seed": seed, **self.losses(workspace / "trained")}
            scratch.write_json(target, result | {"weights": json.loads(mixture.read_text())["weights"]})
            shutil.rmtree(workspace)
        finished: Run = json.loads(target.read_text())
        return finished

    def losses(self, model: Path) -> dict[str, Any]:
        """Losses of a checkpoint on test text, as a Run has them."""
        from tasks.corpus.sampling import windows
        from tasks.moe import checkpoint
        from tasks.moe.loss import window_nll

        loaded, batch = checkpoint.load(model), self.entry.pretrain.micro_batch
        corpus, seq_len = Path("data/corpora") / self.entry.corpus, self.entry.pretrain.seq_len
        heldout = windows.test(corpus, seq_len=seq_len, count=self.entry.evaluate.windows)
        unseen = windows.unseen(corpus, seq_len=seq_len, count=self.entry.evaluate.windows)
        domains = {
            name: float(window_nll(loaded, ids_BL, batch=batch).mean()) / (seq_len - 1)
            for name, ids_BL in (heldout | unseen).items()
        }
        result: dict[str, Any] = {"domains": domains}
        for text, names in (("heldout", heldout), ("unseen", unseen)):
            if names:
                result[text] = statistics.fmean(domains[name] for name in names)
        if isinstance(self.entry.mixture.target, dict) or self.entry.mixture.target in domains:
            targets = self.entry.mixture.targets(list(heldout))
            result["target"] = sum(weight * domains[name] for name, weight in targets.items())
        return result


def compare(pipeline: str, *, seeds: Sequence[int]) -> dict[str, Any]:
    """Train what is missing, write runs/<pipeline>/compare.json and return its content.

    Raises:
        SettingsError, ValueError, TrainingError, OSError, scratch.BusyError: with a message that says how to fix it.
    """
    entry, mixture = settings.load().pipeline(pipeline), Path("runs") / pipeline / "mixture.json"
    if not mixture.exists():
        raise ValueError(f"{mixture}: not found; run the stage `mixture` first")
    tokens = entry.pretrain.tokens
    spent = json.loads(mixture.read_text())["evidence"].get("cost") or {"share_of_training": 0.0}
    share = spent.get("flops_share", spent["share_of_training"])  # of FLOPs, so that a smaller proxy is cheaper
    with scratch.workspace("compare", pipeline) as work:
        comparison = Comparison(pipeline=pipeline, entry=entry, work=work)
        own = [comparison.run(mixture, seed, tokens) for seed in seeds]
        longer = tokens + math.ceil(share * tokens)
        tables = {
            name: row(own, {method: comparison.baseline(method, budget, seeds) for method in BASELINES})
            for name, budget in (("equal_tokens", tokens), ("equal_cost", longer))
            if name == "equal_tokens" or share
        }
    content = {
        "pipeline": pipeline,
        "method": entry.mixture.method,
        "seeds": list(seeds),
        "cost": share,
        "equal_tokens": tables["equal_tokens"],
        "equal_cost": tables.get("equal_cost"),
    }
    scratch.write_json(Path("runs") / pipeline / "compare.json", content)
    return content


def main(argv: Sequence[str] | None = None) -> int:
    from tasks.pretrain.job import TrainingError

    parser = argparse.ArgumentParser(
        prog="python -m tasks.mixture.compare",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("pipeline", help="a name under `pipelines`, whose stages `mixture` and `partition` have run")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="of the batches")
    arguments = parser.parse_args(argv)
    try:
        print(markdown(compare(arguments.pipeline, seeds=list(dict.fromkeys(arguments.seeds)))))
    except (ValueError, OSError, TrainingError, scratch.BusyError) as error:
        print(f"compare: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
