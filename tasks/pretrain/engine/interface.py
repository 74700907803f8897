"""The model in DeepSpeed's engine: the one interface to DeepSpeed.

No file outside this folder imports DeepSpeed or reads its attributes. tests/pretrain/engine/test_contract.py tests
each of DeepSpeed's internals that the folder relies on, and says what to change when a release breaks one.

Nothing here needs a compiler: the optimizer is torch's fused AdamW, and DeepSpeed's shared-memory collectives, which
it would build with g++ at the first collective, are switched off.
"""

from __future__ import annotations

import contextlib
import gc
import io
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tasks import plugin
from tasks.pretrain import trainable
from tasks.pretrain.engine import configuration, cpu_step, masters, optimizer, universal
from tasks.pretrain.job import TrainingError
from tasks.settings import Pretrain

if TYPE_CHECKING:
    import torch
    from deepspeed import DeepSpeedEngine
    from transformers import PreTrainedModel

    from tasks.pretrain.engine.checkpoint_writer import Write
    from tasks.settings.pretrain import Part

_COMPILER_SIGNS = ("ninja", "jit load", "cuda_home", "error building extension", "missingcuda", "compiler", "nvcc")


class Engine:
    """A model, its optimizer and its gradients on every rank. All ranks make the same calls in the same order."""

    def __init__(self, deepspeed: DeepSpeedEngine, *, config: dict[str, Any]) -> None:
        """`config`: the effective DeepSpeed configuration, as JSON."""
        from tasks.pretrain.engine.checkpoint_writer import CheckpointCollector

        self.deepspeed, self.config = deepspeed, config
        self._collector = CheckpointCollector.install(deepspeed)

    @property
    def module(self) -> PreTrainedModel:
        module: PreTrainedModel = self.deepspeed.module
        return module

    @property
    def dtype(self) -> torch.dtype:
        """Of the weights in the forward pass."""
        return next(self.module.parameters()).dtype

    @property
    def optimizer_name(self) -> str:
        """DeepSpeed's optimizer class: a checkpoint of one cannot be read by another."""
        return type(self.deepspeed.optimizer).__name__

    @property
    def waited(self) -> float:
        """Seconds that optimizer steps have waited for the copies of a checkpoint."""
        return self._collector.waited

    def __call__(self, **inputs: Any) -> Any:
        """The model's forward pass."""
        return self.deepspeed(**inputs)

    def backward(self, loss: torch.Tensor) -> None:
        self.deepspeed.backward(loss)

    def next_micro_batch(self) -> None:
        """Tell DeepSpeed that another micro-batch of the same optimizer step follows."""
        self.deepspeed.step()

    def set_rates(self, *, step: int, params: Pretrain) -> dict[Part, float]:
        """Set the learning rates and the trained parts of an optimizer step; see `optimizer.set_rates`."""
        return optimizer.set_rates(self.deepspeed, step=step, params=params)

    def finish_step(self) -> float:
        """Take the optimizer step; returns the norm of the gradient, see `optimizer.finish`."""
        return optimizer.finish(self.deepspeed)

    def discard_step(self) -> None:
        """Forget the gradients of this optimizer step; see `optimizer.discard`."""
        optimizer.discard(self.deepspeed)

    def full_weights(self) -> dict[str, torch.Tensor] | None:
        """Every parameter whole and in fp32, from the fp32 weights of the optimizer: on rank 0, by name, on the CPU.

        The other ranks get None. A tied parameter comes under its first name.
        """
        full_weights = (_plug_in(self.config) or masters).full_weights
        whole: dict[str, torch.Tensor] | None = full_weights(self.deepspeed)
        return whole

    def save(
        self, folder: Path, *, texts: dict[Path, str], then: Callable[[dict[str, dict[str, Any]]], None]
    ) -> Write:
        """Begin to write DeepSpeed's files into a folder; training may go on when this returns.

        Args:
            texts: text files to write beside them, by path.
            then: called in the writing thread when all are on the disk, with {bytes, xxh3_128} of each by name.

        Raises:
            OSError: the folder cannot be made.
        """
        client: dict[str, Any] = {}
        if self.deepspeed.zero_optimization_stage() in (1, 2) and _plug_in(self.config) is None:
            client = universal.INFO
        with optimizer.all_phases(self.deepspeed):
            self.deepspeed.save_checkpoint(str(folder.parent), tag=folder.name, client_state=client, save_latest=False)
        return self._collector.write(texts, then=then)

    def load(self, folder: Path, *, convert: bool) -> None:
        """Load what `save` wrote. `convert`: it was written by another number of processes or another optimizer.

        Raises:
            TrainingError: DeepSpeed cannot load or convert it.
        """
        if convert:
            universal.load_converted(self.deepspeed, folder)
        else:
            universal.load(self.deepspeed, folder, is_universal=False)

    def close(self) -> None:
        """Take out DeepSpeed's hooks: autograd's nodes hold them, they the model, and no collector sees the circle."""
        self.deepspeed.destroy()


def build(model: PreTrainedModel, params: Pretrain, *, config: dict[str, Any] | None = None) -> Engine:
    """Put a model into an engine, freeze in it what no phase trains, and fit the buckets to its size.

    Args:
        config: DeepSpeed's; that of the settings by default (`configuration.of`).

    Raises:
        TrainingError: DeepSpeed asks for a compiler that is not there, or the settings ask for what the model or
            DeepSpeed cannot do.
    """
    import deepspeed

    from tasks.moe import gate

    if config is None:
        config = configuration.of(params, dtype=model.dtype, model_type=model.config.model_type)
    trainable.freeze(model, params)
    if params.zero_stage == 3 and params.train != "all":
        # Where nothing before a module is trained, DeepSpeed frees its weights before their gradients are taken.
        model.enable_input_require_grads()
    groups = trainable.groups(model, params)
    for module in plugin.modules("engine").values():
        module.check(model, params)
    other = _plug_in(config)
    bucket = min(configuration.BUCKET, sum(parameter.numel() for parameter in model.parameters()))
    config["zero_optimization"] |= {"reduce_bucket_size": bucket, "allgather_bucket_size": bucket}
    biases = gate.biases(model)
    try:
        with _quiet(), other.conversion(params) if other else contextlib.nullcontext():
            engine, *_ = deepspeed.initialize(model=model, model_parameters=groups, config=config)
    except (RuntimeError, OSError, ImportError) as error:
        if message := needs_compiler(error):
            raise TrainingError(message) from error
        raise
    if other:
        other.prepare(engine, biases=biases)
    optimizer.undo_first_step(engine)
    optimizer.prepare(engine.basic_optimizer)
    built = Engine(engine, config=config)
    if not other:
        cpu_step.install(engine)  # after the hooks that its update must come after
    return built


def _plug_in(config: dict[str, Any]) -> Any:
    """The plug-in whose engine a DeepSpeed configuration asks for; None for DeepSpeed's own."""
    return next((module for module in plugin.modules("engine").values() if module.prepares(config)), None)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Hide DeepSpeed's prints of the memory around each optimizer group, and make cheap what goes before them.

    That is a collection of the whole process's garbage, a quarter of a second each with transformers imported.
    """
    gc.freeze()
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            yield
    finally:
        gc.unfreeze()


def needs_compiler(error: BaseException) -> str | None:
    """The message for an error by which DeepSpeed says that it could not build an operator, or None."""
    text = f"{type(error).__name__}: {error}"
    if not any(sign in text.lower() for sign in _COMPILER_SIGNS):
        return None
    return (
        f"DeepSpeed wants to compile an operator and cannot ({text.splitlines()[0]}). Install a C++ "
        "compiler and ninja (Debian: apt-get install g++ ninja-build), with CUDA its toolkit too, then run again"
    )
