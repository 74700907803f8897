"""What was measured, as a JSON file that survives a crash, and as lines for the eye."""

import json
import os
import subprocess
from pathlib import Path
from typing import Any

from bench.kernels.measure import Result
from bench.kernels.peers import OURS
from bench.kernels.roofline import Card, full_flops, pass_floor, saved_bytes
from bench.kernels.shapes import Shape

ROOT = Path(__file__).resolve().parents[2]
# Least fraction of the roofline, forward + backward, uniform routing. The best published Triton kernels reach 0.39 of
# it on an H100, and 0.35 at 8192 tokens.
GOALS = {
    ("llama-moe-3.5b-4of16", 32768): 0.55,
    ("qwen3-30b-a3b", 32768): 0.50,
    ("qwen3-30b-a3b", 8192): 0.36,
}
HEADER = (
    f"{'':26}{'fwd':>9}{'bwd':>9}{'full':>9}{'infer':>9}{'TF/s':>7}{'roof':>7}{'vs ours':>9}"
    f"{'kept MB':>9}{'peak MB':>9}{'bitwise':>9}{'error':>9}{'first s':>9}"
)


def commit() -> str:
    """Of this checkout, with ``+changes`` where files differ from it; ``unknown`` outside one."""
    try:
        git = ["git", "-C", str(ROOT)]
        head = subprocess.run([*git, "rev-parse", "--short=12", "HEAD"], capture_output=True, text=True, check=True)
        changed = subprocess.run([*git, "status", "--porcelain", "--", "kernels"], capture_output=True, text=True)
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return head.stdout.strip() + ("+changes" if changed.stdout.strip() else "")


class Report:
    """The file: ``about`` (card, versions, commit …) and ``cells``, one for each shape and routing, of sides."""

    def __init__(self, path: Path, *, about: dict[str, Any], resume: bool) -> None:
        """Starts the file anew, or goes on with it.

        Raises:
            ValueError: the file to go on with is of another card, version or commit.
        """
        self.path, self.about = path, about
        self.cells: dict[str, dict[str, Any]] = {}
        if resume and path.exists():
            kept = json.loads(path.read_text())
            for field, value in about.items():
                if field != "command" and kept["about"].get(field) != value:
                    raise ValueError(
                        f"--resume: {path} was taken with {field} {kept['about'].get(field)!r}, and this is "
                        f"{value!r}; give another --json, or leave --resume out to start the file anew"
                    )
            self.cells = kept["cells"]
        for sides in self.cells.values():
            for name, result in sides["sides"].items():
                if result["status"] == "running":
                    sides["sides"][name] = {"status": "failed", "reason": "the process ended while this ran"}

    def sides(self, shape: Shape, routing: str, *, card: Card | None) -> dict[str, Result]:
        """The results so far of one cell, by name; add to it and :meth:`save`."""
        sizes = vars(shape) | {"routing": routing, "saved_bytes": saved_bytes(shape)}
        if card is not None:
            sizes |= {"pass_floor_ms": pass_floor(shape, card)}
        cell = self.cells.setdefault(f"{shape}, {routing}", sizes | {"sides": {}})
        results: dict[str, Result] = cell["sides"]
        return results

    def save(self) -> None:
        """Writes the whole file by a rename."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        temporary = self.path.with_name(self.path.name + ".tmp")
        temporary.write_text(json.dumps({"about": self.about, "cells": self.cells}, indent=1, allow_nan=False) + "\n")
        os.replace(temporary, self.path)


def add_ratios(result: Result, shape: Shape, *, card: Card | None, ours: Result | None, bound: bool) -> None:
    """Adds what follows from the times: TF/s, fractions of the roofline, and time / our time.

    The last is given only where both sides agree with the reference, or where the other is a bound.
    """
    if result["status"] != "ok":
        return
    ms = result["ms"]
    result["tflops"] = full_flops(shape) / ms["full"] / 1e9
    if card is not None:
        floors = pass_floor(shape, card)
        result["roofline"] = {name: floors[name] / ms[name] for name in ms}
    if ours is not None and ours["status"] == "ok":
        result["bound_vs_ours" if bound else "speed_up"] = {name: ms[name] / ours["ms"][name] for name in ms}


def line(name: str, result: Result) -> str:
    """One side, under :data:`HEADER`."""
    if result["status"] != "ok":
        verb = {"refused": "is refused", "unfit": "cannot run this", "failed": "failed"}[result["status"]]
        return f"{name} {verb}: {result['reason']}"

    def cell(value: float | None, digits: int = 3) -> str:
        return "-" if value is None else f"{value:.{digits}f}"

    def mega(field: str) -> str:
        return cell(result[field] / 1e6 if result.get(field) is not None else None, 0)

    def full(field: str) -> Any:
        return result.get(field, {}).get("full")

    ms = result["ms"]
    times = "".join(f"{ms[key]:9.3f}" for key in ("forward", "backward", "full", "inference"))
    ratio = full("speed_up") if "speed_up" in result else full("bound_vs_ours")
    bitwise = {True: "yes", False: "NO", None: "-"}[result.get("deterministic")]
    error = "-" if result.get("error") is None else f"{result['error']:.0e}"
    return (
        f"{name:26}{times}{result['tflops']:7.1f}{cell(full('roofline')):>7}"
        f"{cell(ratio, 2):>9}{mega('kept_bytes'):>9}{mega('peak_bytes'):>9}{bitwise:>9}{error:>9}"
        f"{result['first_call_s']:9.1f}"
    )


def verdict(shape: Shape, routing: str, ours: Result | None) -> str | None:
    """The goal of this shape and whether it is reached, or None where it has none."""
    goal = GOALS.get((shape.name, shape.tokens))
    if goal is None or routing != "uniform" or ours is None or "roofline" not in ours:
        return None
    got, kept, formula = ours["roofline"]["full"], ours.get("kept_bytes"), saved_bytes(shape)
    said = f"goal: {goal:.2f} of the roofline: {got:.3f}, {'reached' if got >= goal else 'missed'}"
    if kept is not None:
        said += f"; kept {kept / 1e6:.0f} MB, formula {formula / 1e6:.0f} MB"
    return f"{said}; {OURS} is {'' if ours['deterministic'] else 'NOT '}bitwise repeatable"
