"""The experts layer on one GPU against its peers and the roofline; a side that disagrees gets no figure.

    python -m bench.kernels.gpu_layer
    python -m bench.kernels.gpu_layer --shapes qwen3-30b-a3b@8192 32768,16,4,4096,688 --routing zipf
    python -m bench.kernels.gpu_layer --resume --minutes 30
    python -m bench.kernels.gpu_layer --cpu

Columns: median ms of forward, backward, both, and forward without gradients, L2 overwritten before each run, the first
call (compiling, tuning) apart; TF/s = 18 T K D F / full; ``roof``, the fraction of the roofline of a known card, each
pass as one block; time / our time; bytes kept for backward and peak bytes above the inputs; whether two runs gave
equal bits; the largest relative error of output and gradients.

``--cpu`` runs the same program on small shapes with a wall clock: ours on its CPU path (under TRITON_INTERPRET=1 the
Triton kernels, interpreted; with --dtype float16, because the interpreter computes most peers' bf16 wrongly). It shows
that the program works; its figures say nothing of a GPU.
"""

import argparse
import sys
import time
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from bench.kernels.check import reference
from bench.kernels.device import Cpu, Cuda, Device
from bench.kernels.measure import attempt
from bench.kernels.peers import OURS, Peer, all_peers
from bench.kernels.report import HEADER, Report, add_ratios, commit, line, verdict
from bench.kernels.roofline import CARDS, Card, pass_floor, saved_bytes
from bench.kernels.shapes import ALL, DEFAULT, ROUTINGS, SMALL, RoutingName, Shape, make_problem, parse_shape

NO_GPU = (
    "gpu_layer.py measures one CUDA device, and torch sees none here. On a machine with one, install a CUDA build of "
    "torch and run the same command.\nWithout: --cpu runs the same program on small shapes with CPU times, to see "
    "that it works; bench/kernels/cpu_layer.py measures the CPU path."
)


def arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", help="NAME@T or T,E,K,D,F, or all; by default ten of the table")
    parser.add_argument("--routing", default=",".join(ROUTINGS), help="uniform, zipf, or both with a comma")
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float16"])
    parser.add_argument("--minutes", type=float, default=8, help="of the whole run")
    parser.add_argument("--box", type=float, default=30, help="seconds for one side of one shape")
    parser.add_argument("--seconds", type=float, default=0.1, help="of measuring for each time")
    parser.add_argument("--json", type=Path, default=Path(".scratch/gpu_layer.json"))
    parser.add_argument("--resume", action="store_true", help="keep what the JSON file has, measure the rest")
    parser.add_argument("--cpu", action="store_true", help="small shapes on the CPU, to see the program work")
    args = parser.parse_args(argv)
    args.routings = args.routing.split(",")
    if not set(args.routings) <= set(ROUTINGS):
        parser.error(f"--routing {args.routing!r}: choose from {', '.join(ROUTINGS)}")
    if args.box >= 60 * args.minutes:
        parser.error(f"--box {args.box:g}: one side's seconds are fewer than those of --minutes {args.minutes:g}")
    named = args.shapes or (SMALL if args.cpu else DEFAULT)
    try:
        args.shapes = [parse_shape(text) for text in (ALL if named == ["all"] else named)]
    except argparse.ArgumentTypeError as error:
        parser.error(f"argument --shapes: {error}")
    return args


def about(args: argparse.Namespace, device: Device) -> dict[str, Any]:
    def installed(name: str) -> str:
        try:
            return version(name)
        except PackageNotFoundError:
            return "missing"

    versions = {name: installed(name) for name in ("torch", "triton", "transformers")}
    rest = {"dtype": args.dtype, "commit": commit(), "command": " ".join(sys.argv)}
    return {"card": device.name, "driver": device.driver()} | versions | rest


def run(
    args: argparse.Namespace, peers: Sequence[Peer], *, device: Device, card: Card | None, report: Report, until: float
) -> int:
    """Measures what the report lacks; gives the number of sides that were left for want of time."""
    left = 0
    for shape in args.shapes:
        for routing in args.routings:
            sides = report.sides(shape, routing, card=card)
            todo = [peer for peer in peers if peer.name not in sides]
            if time.monotonic() >= until and not sides:
                left += len(todo)
                continue
            print(f"\n{shape}, {routing}; keeps {saved_bytes(shape) / 1e6:.1f} MB by the formula", end="")
            print("" if card is None else f"; floor {pass_floor(shape, card)['full']:.3f} ms")
            print(HEADER, *(line(name, result) for name, result in sides.items()), sep="\n", flush=True)
            if todo:
                left += run_cell(todo, shape, routing, args=args, device=device, card=card, report=report, until=until)
            print(verdict(shape, routing, sides.get(OURS)) or "", flush=True)
    return left


def run_cell(
    peers: Sequence[Peer],
    shape: Shape,
    routing: RoutingName,
    *,
    args: argparse.Namespace,
    device: Device,
    card: Card | None,
    report: Report,
    until: float,
) -> int:
    """Measures ``peers`` on one problem; gives the number of those left for want of time."""
    sides = report.sides(shape, routing, card=card)
    try:
        problem = make_problem(shape, routing, dtype=getattr(torch, args.dtype), device=device.type)
        expected = reference(problem)
    except torch.OutOfMemoryError:
        print("this shape and its reference do not fit into the device's memory")
        return 0
    for done, peer in enumerate(peers):
        if time.monotonic() >= until:
            return len(peers) - done
        sides[peer.name] = {"status": "running"}
        report.save()
        try:
            result = attempt(peer, problem, expected=expected, device=device, seconds=args.seconds, box=args.box)
        except BaseException:  # Ctrl-C is no fault of the side
            del sides[peer.name]
            report.save()
            raise
        result["version"] = peer.version()
        add_ratios(result, shape, card=card, ours=sides.get(OURS) if peer.name != OURS else None, bound=peer.bound)
        sides[peer.name] = result
        report.save()
        print(line(peer.name, result), flush=True)
        try:
            device.clean()
        except RuntimeError:  # an illegal access, say: the CUDA context is lost
            raise SystemExit(f"{peer.name} took the device down; the same command with --resume goes on") from None
    return 0


def announce(args: argparse.Namespace, peers: Sequence[Peer], *, card: Card | None, report: Report) -> list[Peer]:
    """Says what will be measured, on what, by when, and who is missing; gives those who are not."""
    print(", ".join(f"{key} {value}" for key, value in report.about.items() if value and key != "command"))
    if card is not None:
        print(f"roofline: {card.peak / 1e12:.1f} TFLOP/s, {card.bandwidth / 1e9:.0f} GB/s")
    absent = {peer.name: said for peer in peers if (said := peer.missing())}
    print(*absent.values(), sep="\n", end="\n" if absent else "")
    present = [peer for peer in peers if peer.name not in absent]
    print("sides:", "; ".join(" ".join(filter(None, (peer.name, peer.version()))) for peer in present))
    counts = f"{len(args.shapes)} shapes x {len(args.routings)} routings x {len(present)} sides"
    print(f"{counts}: {args.minutes:g} minutes at most", flush=True)
    return present


def main(argv: Sequence[str] | None = None, *, peers: Sequence[Peer] | None = None) -> None:
    args = arguments(argv)
    if not args.cpu and not torch.cuda.is_available():
        raise SystemExit(NO_GPU)
    start = time.monotonic()
    device: Device = Cpu() if args.cpu else Cuda()
    card = CARDS.get(device.name)
    try:
        report = Report(args.json, about=about(args, device), resume=args.resume)
    except ValueError as error:
        raise SystemExit(str(error)) from None
    present = announce(args, peers or all_peers(), card=card, report=report)
    until = start + 60 * args.minutes - args.box  # no side begins that might end after the time
    left = run(args, present, device=device, card=card, report=report, until=until)
    report.save()
    print(f"\n{args.json}: {len(report.cells)} cells after {(time.monotonic() - start) / 60:.1f} minutes")
    if left:
        print(f"{left} sides were left for want of time; the same command with --resume measures them")


if __name__ == "__main__":
    main()
