"""Every partition method beside its bounds and pruning, right after the conversion.

    python -m bench.partition.compare                       # the whole table
    python -m bench.partition.compare --only oracle LLaMA   # rows whose name has one of these words in it

Prints method x share of the FFN active: perplexity on validation windows of every domain and its ratio to the dense
parent's, identity error, seconds of construction, peak memory, and the speed of a converted layer. A row runs in a
process of its own and its results are kept at once: run again, and only what is missing is computed.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import shutil
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from bench import common
from bench.partition import rows
from tasks import scratch
from tasks.settings import Partition

if TYPE_CHECKING:
    from bench.partition.baselines import Ffn
    from tasks.moe.streamed import Streamed

SEQ_LEN = 512
_TOKENS = 1024  # of the timed forward pass


@dataclass(frozen=True, kw_only=True)
class Job:
    """One row at one share and seed."""

    row: str
    share: int
    seed: int
    model_dir: str
    corpus_dir: str
    windows: int
    calibration: int = rows.CALIBRATION
    partition: dict[str, Any] | None = None
    """Settings of the stage; None for rows that are none."""


def jobs(
    model_dir: Path,
    corpus_dir: Path,
    *,
    windows: int,
    seeds: int,
    only: list[str],
    calibration: int = rows.CALIBRATION,
    shares: Sequence[int] = rows.SHARES,
) -> Iterator[Job]:
    """The dense parent, then every row whose name has one of the words `only` in it, or all, share by share."""
    width = json.loads((model_dir / "config.json").read_text())["intermediate_size"]
    where: Any = {"model_dir": str(model_dir), "corpus_dir": str(corpus_dir)}
    where |= {"windows": windows, "calibration": calibration}
    yield Job(row="dense", share=100, seed=0, **where)
    own = rows.methods(width, calibration=calibration)
    names = [name for name in [*rows.plain(rows.SHARES[0]), *own] if not only or any(word in name for word in only)]
    for share in shares:
        for name in names:
            for seed in range(seeds if name in rows.SEEDED else 1):
                options = own[name][share].model_copy(update={"seed": seed}).model_dump() if name in own else None
                yield Job(row=name, share=share, seed=seed, partition=options, **where)


def run(job: Job) -> dict[str, Any]:
    """The figures of one row, computed in this process, whose peak memory is one of them."""
    import torch

    from tasks.corpus.sampling import windows
    from tasks.moe.streamed import Streamed

    validation = windows.validation(Path(job.corpus_dir), seq_len=SEQ_LEN, count=job.windows)
    parent = Streamed(Path(job.model_dir))
    figures = _plain(job, parent, validation) if job.partition is None else _method(job, parent, validation)
    counts = {name: len(ids) for name, ids in validation.items()}
    return {**figures, "validation": counts, "threads": torch.get_num_threads()}


def _plain(job: Job, parent: Streamed, validation: dict[str, np.ndarray]) -> dict[str, Any]:
    from bench.partition import baselines
    from tasks.partition import calibration

    row, text = rows.plain(job.share)[job.row], None
    if row.calibrated:
        text, _ = calibration.draw(Path(job.corpus_dir), seq_len=SEQ_LEN, count=job.calibration, seed=job.seed)
    measured = baselines.measure(parent, validation, row.build, calibration=text)
    return {
        "nats": measured.nats,
        "seconds": measured.seconds,
        "peak_mib": common.memory("VmHWM") / 2**20,
        "tokens_per_s": _speeds(parent, measured.middle if row.timed else None),
    }


def _method(job: Job, parent: Streamed, validation: dict[str, np.ndarray]) -> dict[str, Any]:
    import torch

    from bench.partition import baselines
    from tasks.moe.streamed import Streamed
    from tasks.partition import index
    from tasks.partition.construct import construct

    partition = Partition.model_validate(job.partition)
    with scratch.workspace("compare", scratch.fingerprint(asdict(job)), inputs=asdict(job)) as folder:
        shutil.rmtree(folder / "moe", ignore_errors=True)  # of a row that failed or was killed
        start = time.perf_counter()
        made = construct(
            Path(job.model_dir),
            Path(job.corpus_dir),
            partition,
            seq_len=SEQ_LEN,
            folder=folder,
            report=lambda *_: None,
        )
        seconds, peak = time.perf_counter() - start, common.memory("VmHWM") / 2**20
        sparse = Streamed(folder / "moe")
        nll_B = sparse.nll(np.concatenate(list(validation.values())), batch=4) / (SEQ_LEN - 1)
        split = index.read(folder / "partition.safetensors")
        bound = baselines.expert_oracle(split.layers, shared=split.shared_experts, top_k=partition.top_k)
        block: Any = sparse.block(next(iter(split.layers)))
    shutil.rmtree(folder.parent)
    parts = [part for name in ("mlp", "block_sparse_moe", "shared_mlp") if (part := getattr(block, name, None))]
    return {
        "nats": baselines.by_domain(nll_B, validation),
        "seconds": seconds,
        "parts": made["seconds"],
        "peak_mib": peak,
        "identity_error": made["identity_error"],
        "oracle_nats": baselines.measure(parent, validation, bound).nats,
        "tokens_per_s": _speeds(parent, lambda x_TD: torch.stack([part(x_TD[None])[0] for part in parts]).sum(0)),
    }


def _speeds(parent: Streamed, ffn: Ffn | None) -> list[float]:
    """Tokens/s of one layer's forward pass: the dense FFN's, then `ffn`'s; the best of seven, taken in turns."""
    import torch

    block: Any = parent.block(parent.layers // 2)
    x_TD = torch.randn(_TOKENS, parent.config.hidden_size, generator=torch.Generator().manual_seed(0))
    best = [float("inf")] * (1 if ffn is None else 2)
    with torch.no_grad():
        for turn in range(8):
            for place, step in enumerate([block.mlp, ffn][: len(best)]):
                start = time.perf_counter()
                step(x_TD)
                if turn:  # the first one warms up
                    best[place] = min(best[place], time.perf_counter() - start)
    return [_TOKENS / seconds for seconds in best]


def complete(wanted: list[Job], path: Path, *, key: Any) -> list[dict[str, Any]]:
    """The results of the jobs, from the file where they are there, else computed and appended to it.

    A row that fails is reported and left out, and is tried again the next time.

    Args:
        key: what the results depend on besides the job.
    """
    kept: dict[str, dict[str, Any]] = json.loads(path.read_text()) if path.exists() else {}
    results = []
    for number, job in enumerate(wanted, 1):
        name = scratch.fingerprint([asdict(job), key])
        title = f"[{number}/{len(wanted)}] {job.row}, {job.share} % active, seed {job.seed}"
        if name not in kept:
            _say(f"{title} ...")
            start = time.perf_counter()
            with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
                try:
                    figures = pool.submit(run, job).result()
                except Exception as error:  # whatever a row dies of, the others are still wanted
                    _say(f"{title} failed: {type(error).__name__}: {error}")
                    continue
            kept[name] = {**asdict(job), **figures}
            scratch.write_json(path, kept)
            _say(f"{title}: perplexity {_perplexity(figures['nats']):.2f}, {time.perf_counter() - start:.0f} s")
        results.append(kept[name])
    return results


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _perplexity(nats: dict[str, float]) -> float:
    return float(np.exp(np.mean(list(nats.values()))))


def table(results: list[dict[str, Any]]) -> Iterator[str]:
    """Two markdown tables: every row's figures, means over its seeds, and its perplexity on each domain."""
    parent, *_ = (row for row in results if row["row"] == "dense")
    dense, domains = _perplexity(parent["nats"]), list(parent["nats"])
    grouped: dict[tuple[str, int], list[dict[str, Any]]] = {}
    names = list(dict.fromkeys(row["row"] for row in results))
    for row in sorted(results, key=lambda row: (names.index(row["row"]), row["share"])):
        grouped.setdefault((row["row"], row["share"]), []).append(row)
    yield (
        "| | FFN active | perplexity | × dense | seeds: × dense | experts by true energy: × dense | identity error | "
        "construction, s | peak, MiB | layer, tokens/s | × dense layer |"
    )
    yield "|---|---:|---:|---:|---|---:|---:|---:|---:|---:|---:|"
    for (name, share), group in grouped.items():
        ratios = [_perplexity(row["nats"]) / dense for row in group]
        bounds = [_perplexity(row["oracle_nats"]) / dense for row in group if "oracle_nats" in row]
        speeds = [row["tokens_per_s"] for row in group if len(row["tokens_per_s"]) == 2]
        cells = [
            f"{share} %",
            _mean([_perplexity(row["nats"]) for row in group]),
            _mean(ratios),
            f"{_mean([min(ratios)])} to {_mean([max(ratios)])} ({len(group)})" if len(group) > 1 else "",
            _mean(bounds) if bounds else "",
            f"{max(row['identity_error'] for row in group):.1e}" if "identity_error" in group[0] else "",
            f"{np.mean([row['seconds'] for row in group]):.0f}",
            f"{np.mean([row['peak_mib'] for row in group]):.0f}",
            f"{np.mean([own for _, own in speeds]):.0f}" if speeds else "",
            f"{np.mean([own / full for full, own in speeds]):.2f}" if speeds else "",
        ]
        yield f"| {name} | {' | '.join(cells)} |"
    yield ""
    yield f"| perplexity | FFN active | {' | '.join(domains)} |"
    yield f"|---|---:|{'---:|' * len(domains)}"
    for (name, share), group in grouped.items():
        each = [_mean([float(np.exp(row["nats"][domain])) for row in group]) for domain in domains]
        yield f"| {name} | {share} % | {' | '.join(each)} |"


def _mean(values: list[float]) -> str:
    mean = sum(values) / len(values)
    return f"{mean:.2f}" if mean < 1000 else f"{mean:,.0f}"


def main(argv: Sequence[str] | None = None) -> int:
    """Compute what is missing, and print the table."""
    parser = argparse.ArgumentParser(
        prog="python -m bench.partition.compare",
        description="Perplexity right after the conversion, method by method, beside bounds and pruning.",
        epilog="With the defaults about 120 rows, some four hours of one core for the default model (two and a half "
        "with --seeds 1): a row without calibration text takes half a minute, one with it 1 to 5 minutes.",
    )
    parser.add_argument("--model", default="smollm2-135m-q4", help="a dense model under data/models")
    parser.add_argument("--corpus", default="wide", help="a corpus under data/corpora")
    parser.add_argument("--windows", type=int, default=2, help=f"validation windows of {SEQ_LEN} tokens per domain")
    parser.add_argument(
        "--calibration", type=int, default=rows.CALIBRATION, help="training windows that rows are fitted to"
    )
    parser.add_argument("--only", nargs="+", default=[], metavar="NAME", help="rows whose name has one of these in it")
    parser.add_argument(
        "--shares", type=int, nargs="+", default=rows.SHARES, choices=rows.SHARES, help="per cent of the FFN"
    )
    parser.add_argument("--seeds", type=int, default=3, help="seeds of the rows that depend on one")
    parser.add_argument("--json", type=Path, default=scratch.ROOT / "compare.json", help="where the results are kept")
    args = parser.parse_args(argv)
    model_dir, corpus_dir = Path("data/models") / args.model, Path("data/corpora") / args.corpus
    try:
        inputs = [scratch.digest(model_dir), scratch.digest(corpus_dir / "manifest.json")]
        wanted = list(
            jobs(
                model_dir,
                corpus_dir,
                windows=args.windows,
                seeds=args.seeds,
                only=args.only,
                calibration=args.calibration,
                shares=args.shares,
            )
        )
    except (ValueError, OSError) as error:
        _say(f"compare: {error}")
        return 1
    results = complete(wanted, args.json, key=inputs)
    if not results or results[0]["row"] != "dense":
        _say("compare: the dense model could not be measured, so there is nothing to compare with")
        return 1
    counts = results[0]["validation"].values()
    print(
        f"{args.model}, {sum(counts)} validation windows of {SEQ_LEN} tokens from the {len(counts)} domains of "
        f"{args.corpus}; perplexity is exp of the loss, which is the mean over the domains; {results[0]['threads']} "
        "threads.\n"
    )
    print(*table(results), sep="\n")
    return 0 if len(results) == len(wanted) else 1


if __name__ == "__main__":
    sys.exit(main())
