"""Write a Hugging Face checkpoint: at the end of a run, or of any step whose checkpoint is kept, while it goes on.

    python -m tasks.pretrain.export PIPELINE [--step N] [--to DIR]

Reads .scratch/pretrain-<pipeline>/, or finished-<pipeline>/; writes DIR, or runs/<pipeline>/exported/step-<N>/.
Without --step, the newest. The weights are the optimizer's fp32 weights in the converted model's dtype, and load with
`AutoModelForCausalLM` and none of this code.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from tasks import scratch
from tasks.pretrain.checkpoints import finished, resume, store
from tasks.pretrain.engine import masters
from tasks.pretrain.job import JOB, Job, TrainingError
from tasks.settings import Pretrain

if TYPE_CHECKING:
    import torch

    from tasks.corpus.sampling.loader import Loader
    from tasks.pretrain.hook import Hook

FIT_TOKENS = 8192
"""Training tokens on which linear routers are fitted to two-layer gates."""
_WEIGHTS = ("*.safetensors", "*.safetensors.index.json", "config.json")


def run(pipeline: str, *, step: int | None = None, to: Path | None = None) -> tuple[Path, dict[str, Any]]:
    """Export a kept checkpoint of an unfinished run, which may be going on, or of a finished one if there is none.

    Returns:
        The folder, and what `write` returns.

    Raises:
        TrainingError: there is no such checkpoint, or it cannot be exported.
    """
    from tasks.corpus import manifest
    from tasks.pretrain import batches

    source = _source(pipeline)
    job = Job.read(source / JOB)
    with scratch.workspace("export", pipeline) as folder:
        linked = folder / "checkpoints"
        state = _hold(source / "checkpoints", linked, step=step)
        target = to or Path("runs") / pipeline / "exported" / state["tag"]
        if to is not None and to.exists() and any(to.iterdir()):
            raise TrainingError(f"--to {to}: the folder is not empty; name another")
        params = Pretrain(**state["params"])

        def windows() -> np.ndarray:
            sampler, loader = batches.draw(
                job, state["weights"], corpus_sha256=manifest.load(job.corpus).sha256, rank=0,
                world_size=state["world_size"],
            )  # fmt: skip
            with loader:
                sampler.restore(state["sampler"])
                return next_windows(loader)

        weights = masters.read(linked / state["tag"], params=params, model=job.model)
        result = folder / "made"
        shutil.rmtree(result, ignore_errors=True)
        fit = write(result, weights, model=job.model, biases=state["hooks"]["balance"], windows=windows)
        scratch.publish(result, target)
        shutil.rmtree(folder)
    return target, fit


def write(
    folder: Path,
    weights: dict[str, torch.Tensor],
    *,
    model: Path,
    biases: list[list[float]] | None,
    hooks: Sequence[Hook] = (),
    windows: Callable[[], np.ndarray],
) -> dict[str, Any]:
    """Write a checkpoint into a new folder, in the converted model's dtype and with the files beside it.

    Two-layer gates and selection biases go into gates.safetensors, and linear routers fitted to them into the
    checkpoint.

    Args:
        weights: every parameter, whole, by its name in training; tied ones under their first name.
        model: the converted model's folder.
        hooks: of the training, which write what is theirs beside the checkpoint.
        biases: of the choice, by sparse layer, if training had them.
        windows: makes token windows [B, L] to fit routers on; called only if there is something to fit.

    Returns:
        How near linear routers come to the trained ones, as `gate_fit`; {} if these were linear.

    Raises:
        ValueError: names or shapes are not those of the converted model.
    """
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM
    from transformers.utils.logging import disable_progress_bar

    from tasks.moe import block, families, files

    disable_progress_bar()
    dtype = getattr(torch, source_dtype(model))
    folder.mkdir(parents=True)
    for path in model.iterdir():  # tokenizer, generation_config, chat template: byte for byte
        if path.is_file() and not any(path.match(pattern) for pattern in _WEIGHTS):
            shutil.copyfile(path, folder / path.name)
    weights = {name: tensor.to(dtype) for name, tensor in weights.items()}
    parts = block.take_out(weights, biases=biases)
    for hook in hooks:
        hook.export(weights, folder)
    config = AutoConfig.from_pretrained(model, local_files_only=True)
    shapes = {name: tuple(tensor.shape) for name, tensor in weights.items()}
    try:
        families.account(shapes, families.expected(config))
    except ValueError as error:
        raise ValueError(f"what was trained {error}; nothing was exported") from None
    with torch.device("meta"):
        stock = AutoModelForCausalLM.from_config(config, dtype=dtype)
    stock.save_pretrained(folder, state_dict=weights)
    files.write_config(stock.config, folder)
    for path in folder.glob("*.safetensors"):
        path.chmod(0o644)  # safetensors writes 0600
    return block.to_stock(folder, parts, windows)


def next_windows(loader: Loader) -> np.ndarray:
    """What training would read next: windows [B, L] of FIT_TOKENS or more."""
    windows = [loader.next().input_ids]
    windows += [loader.next().input_ids for _ in range(FIT_TOKENS // windows[0].size)]
    return np.concatenate(windows)


def source_dtype(model: Path) -> str:
    """The dtype that a checkpoint's config.json states, such as `float32`."""
    config = json.loads((model / "config.json").read_text())
    return str(config.get("dtype") or config.get("torch_dtype") or "float32")


def _hold(source: Path, target: Path, *, step: int | None) -> dict[str, Any]:
    """Link a whole checkpoint's files into target/, where the run's retention cannot delete them; returns its state.

    The newest whole one if `step` is None.
    """
    while True:
        present = store.steps(source)
        if step is not None:
            store.read(source, step)  # raises if it is not there
            present = [step]
        try:
            state, _ = store.newest(target, present, damage=lambda path: _link(source / path.name, path))
        except (FileNotFoundError, shutil.Error):  # the run deleted it meanwhile, and has a newer one
            continue
        if state is None:
            raise TrainingError(f"{source} has no checkpoint yet; the first comes at step pretrain.save_every")
        return state


def _link(source: Path, target: Path) -> str | None:
    """Link a checkpoint's files; returns what is wrong with it."""
    shutil.rmtree(target.parent, ignore_errors=True)
    shutil.copytree(source, target, copy_function=os.link)
    return store.damage(target)


def _source(pipeline: str) -> Path:
    """The workspace of the unfinished run that was started last, or what is kept of the finished one."""
    folders = list(resume.unfinished(pipeline)) or filter(None, [finished.folder(pipeline)])
    jobs = [folder / JOB for folder in folders]
    newest = max((job for job in jobs if job.exists()), key=lambda path: path.stat().st_mtime, default=None)
    if newest is None:
        raise TrainingError(
            f"{pipeline} has no training with a checkpoint; a finished model is in runs/{pipeline}/trained "
            "(pretrain.keep_finished: true keeps its checkpoint)"
        )
    return newest.parent


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m tasks.pretrain.export", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument("pipeline", help="a name under `pipelines` in pipelines.yaml")
    parser.add_argument("--step", type=int, help="a step whose checkpoint is kept; the newest if absent")
    parser.add_argument("--to", type=Path, metavar="DIR", help="runs/PIPELINE/exported/step-N if absent")
    arguments = parser.parse_args()
    try:
        folder, fit = run(arguments.pipeline, step=arguments.step, to=arguments.to)
    except (ValueError, TrainingError, scratch.BusyError, OSError) as error:
        print(f"export {arguments.pipeline}: {error}", file=sys.stderr)
        return 1
    if fit:
        mean = ", ".join(f"{name} {value:.4f}" for name, value in fit["gate_fit"]["mean"].items())
        print(f"linear routers fitted to the gates: {mean}")
    print(folder)
    return 0


if __name__ == "__main__":
    sys.exit(main())
