"""The weights of each method, by the stage `mixture` itself."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tasks
from tasks import scratch
from tasks.mixture import methods
from tasks.mixture.compare.ground import Ground
from tasks.settings.mixture import MEAN, PRIOR, PROXIES, SWARMS, TARGETED

BASELINES = ("uniform", "proportional")
DYNAMIC = "dynamic"
TARGET = "target"
"""As much of the target's own text as `max_epochs` allows, and equal shares of the others if any is left to give."""
REST = 1e-6
"""What it gives the others where no cap binds."""
OTHERS = ("unimax",)


@dataclass(frozen=True, kw_only=True)
class Wanted:
    """One estimate: a method, its seed, and the tokens of the training that it is for."""

    method: str
    seed: int
    tokens: int
    target: str = MEAN
    """The domain whose loss is to fall."""


def known() -> list[str]:
    """The methods that can be compared: what has landed in the registry and needs nothing but the corpus."""
    return [*BASELINES, DYNAMIC, *OTHERS, *(name for name in PROXIES if name in methods.ESTIMATORS)]


def mixture(ground: Ground, wanted: Wanted, *, proxy_tokens: int, units: int) -> dict[str, Any]:
    """The settings `mixture` of an estimate."""
    if wanted.method == DYNAMIC and ground.has_parent:
        return {"method": "reference_loss", "windows": ground.params.eval_windows}
    if wanted.method == TARGET:
        return {"method": "explicit", "weights": {d: 1.0 if d == wanted.target else REST for d in ground.domains}}
    if wanted.method not in PROXIES:
        return {"method": "uniform" if wanted.method == DYNAMIC else wanted.method}
    made = {"method": wanted.method, "proxy": {**ground.proxy, "tokens": proxy_tokens, "seed": wanted.seed}}
    if wanted.method in SWARMS:
        made["swarm"] = {"units": units}
    if wanted.target != MEAN and wanted.method in TARGETED:
        made["target"] = wanted.target
    if wanted.method in PRIOR:  # the mean of the domains is to fall, so the search begins where all are alike
        made["weights"] = dict.fromkeys(ground.domains, 1.0)
    return made


def run(ground: Ground, every: Iterable[Wanted], *, proxy_tokens: int, units: int) -> dict[Wanted, Path]:
    """Estimate what is not there yet, one after the other; {wanted: mixture.json in the ground's folder}.

    Static weights depend on no seed, and are estimated once. A killed estimate goes on by itself: the stage keeps what
    it has.

    Raises:
        ValueError: an estimate failed; the message has the stage's own.
    """
    made: dict[Wanted, Path] = {}
    for wanted in every:
        settings = mixture(ground, wanted, proxy_tokens=proxy_tokens, units=units)
        inputs = {"ground": ground.identity, "mixture": settings, "tokens": wanted.tokens}
        made[wanted] = Path("estimates") / f"{settings['method']}-{scratch.fingerprint(inputs)}.json"
        if not (ground.folder / made[wanted]).exists():
            _estimate(ground, settings, tokens=wanted.tokens, target=ground.folder / made[wanted])
            print(f"estimated: {wanted.method}, seed {wanted.seed}, for {wanted.tokens:,} tokens", flush=True)
    return made


def cost(ground: Ground, mixture: Path) -> float:
    """What an estimate cost, as a share of the training that its weights are for; 0 of a static one.

    FLOPs are compared, so that a smaller proxy is cheaper; tokens where the evidence has no FLOPs.
    """
    spent = json.loads((ground.folder / mixture).read_text())["evidence"].get("cost") or {"share_of_training": 0.0}
    share: float = spent.get("flops_share", spent["share_of_training"])
    return share


def _estimate(ground: Ground, settings: dict[str, Any], *, tokens: int, target: Path) -> None:
    """Run the stage, and keep its mixture.json. Methods that fit a law to the same swarm share its trainings, and so
    do targets."""
    shared = {name: value for name, value in settings.items() if name not in ("method", "target")}
    kind = "swarm" if settings["method"] in SWARMS else settings["method"]
    name = f"{kind}-{scratch.fingerprint({'ground': ground.identity, 'mixture': shared, 'tokens': tokens})}"
    run = ground.folder / "runs" / name
    run.mkdir(parents=True, exist_ok=True)
    if not (run / "moe").is_symlink():  # what `proxy: {model: student}` reads
        (run / "moe").symlink_to((ground.folder / next(iter(ground.models.values()))).resolve())
    ground.write_settings(name, mixture=settings, tokens=tokens)
    _stage(ground.folder, name)
    scratch.write_json(target, json.loads((run / "mixture.json").read_text()))


def _stage(folder: Path, name: str) -> None:
    root = Path(tasks.__file__).resolve().parents[1]
    paths = os.pathsep.join([str(root), str(root / "kernels"), os.environ.get("PYTHONPATH", "")])
    log = folder / "log" / f"{name}.txt"
    log.parent.mkdir(exist_ok=True)
    with log.open("a+") as file:
        done = subprocess.run(
            [sys.executable, "-m", "tasks.mixture", name],
            cwd=folder,
            env=os.environ | {"PYTHONPATH": paths},
            stdout=file,
            stderr=subprocess.STDOUT,
            check=False,
        )
    if done.returncode:
        last = (log.read_text().strip().splitlines() or ["no output"])[-1]
        raise ValueError(f"the stage `mixture` failed for {name}: {last}; its output is in {log}")
