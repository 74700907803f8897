"""One side of one problem: first call, agreement, repeatability, memory, times. Whatever goes wrong has a name."""

import signal
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import FrameType
from typing import Any

import torch
from torch import Tensor

from bench.kernels.check import disagreement
from bench.kernels.device import Device, Prepare, Step, median_ms
from bench.kernels.peers import Peer, Side, Unfit
from bench.kernels.shapes import Problem

Result = dict[str, Any]  # as it stands in the JSON file; ``status`` is ok, refused, unfit or failed


class OverTime(BaseException):
    """A side took longer than its box; no Exception, which a side (or Triton's interpreter) may catch and wrap."""


@contextmanager
def boxed(seconds: float) -> Iterator[None]:
    """Raises :class:`OverTime` in the block once ``seconds`` are over and this thread runs Python: a backward, which
    has a thread of its own on CUDA, is waited for."""

    def ring(number: int, frame: FrameType | None) -> None:
        raise OverTime(f"it took more than {seconds:.0f} s (--box)")

    before = signal.signal(signal.SIGALRM, ring)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def attempt(
    peer: Peer, problem: Problem, *, expected: Sequence[Tensor], device: Device, seconds: float, box: float
) -> Result:
    """:func:`measure`, with what it raises turned into a result."""
    try:
        with boxed(box):
            return measure(peer, problem, expected=expected, device=device, seconds=seconds)
    except Unfit as reason:
        return {"status": "unfit", "reason": str(reason)}
    except (Exception, OverTime) as error:  # a peer may raise anything, and the others are still to be measured
        first_line = str(error).strip().partition("\n")[0]
        return {"status": "failed", "reason": f"{type(error).__name__}: {first_line[:200]}"}


def measure(peer: Peer, problem: Problem, *, expected: Sequence[Tensor], device: Device, seconds: float) -> Result:
    """Everything about one side; nothing is timed of a side that disagrees with the reference.

    Args:
        peer: the implementation.
        problem: what it computes.
        expected: the output and the four gradients, of :func:`bench.kernels.check.reference`.
        device: where.
        seconds: of measuring for each of the four times.
    """
    side = peer.build(problem)
    start = time.perf_counter()
    once(side)
    with torch.no_grad():
        side.forward()
    device.synchronize()
    result: Result = {"status": "ok", "first_call_s": time.perf_counter() - start}
    if not peer.bound:
        got, again = once(side), once(side)
        error, reason = disagreement(got, expected, dtype=problem.x_TD.dtype)
        if reason is not None:
            return result | {"status": "refused", "reason": reason}
        result["error"] = error
        result["deterministic"] = all(map(torch.equal, got, again))
        del got, again
        result |= memory(side, problem, device)
    return result | {"ms": times(side, device, seconds=seconds)}


def once(side: Side) -> list[Tensor]:
    """The output and the gradients."""
    out = side.forward()
    return [out.detach(), *side.backward(out)]


def memory(side: Side, problem: Problem, device: Device) -> Result:
    """``kept_bytes`` between forward and backward (x counted, the output not) and ``peak_bytes`` above the inputs."""
    device.clean()
    before = device.allocated()
    out = side.forward()
    after = device.allocated()
    if before is None or after is None:
        return {}
    kept = after - before - out.nbytes + problem.x_TD.nbytes
    side.backward(out)
    return {"kept_bytes": kept, "peak_bytes": (device.peak() or 0) - before}


def times(side: Side, device: Device, *, seconds: float) -> dict[str, float]:
    """ms of ``inference``, ``forward``, ``backward`` and ``full``.

    Each backward has a forward of its own, untimed: some implementations overwrite what they kept.
    """

    def median(step: Step, prepare: Prepare = lambda: None) -> float:
        return median_ms(step, prepare, device=device, seconds=seconds)

    with torch.no_grad():
        ms = {"inference": median(lambda _: side.forward())}
    ms["forward"] = median(lambda _: side.forward())
    ms["backward"] = median(side.backward, side.forward)
    ms["full"] = median(lambda _: side.backward(side.forward()))
    return ms
