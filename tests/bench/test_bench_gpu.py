"""The GPU benchmark on small CPU problems: all of it but the CUDA clock and the CUDA allocator."""

import argparse
import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import moe_kernels
import pytest
import torch
import transformers
from torch import Tensor

from bench.kernels import gpu_layer
from bench.kernels.check import NAMES, disagreement, reference
from bench.kernels.device import Cpu, median_ms
from bench.kernels.measure import attempt, memory
from bench.kernels.peers import Peer, Side, Unfit, by_autograd, eager, ours
from bench.kernels.report import Report, add_ratios, line, verdict
from bench.kernels.roofline import CARDS, saved_bytes
from bench.kernels.shapes import ALL, DEFAULT, Problem, draw_experts, make_problem, parse_shape

SHAPE = "24,4,2,16,16"


def problem(text: str = SHAPE, dtype: torch.dtype = torch.bfloat16) -> Problem:
    return make_problem(parse_shape(text), "uniform", dtype=dtype, device="cpu")


def changed(change: Callable[[Tensor], Tensor]) -> Callable[[Problem], Side]:
    """An adapter whose w2 gradient is not that of the layer."""

    def build(p: Problem) -> Side:
        right = ours(p)

        def backward(out: Tensor) -> Sequence[Tensor]:
            x, w13, w2, weights = right.backward(out)
            return x, w13, change(w2), weights

        return Side(forward=right.forward, backward=backward)

    return build


def raises(p: Problem) -> Side:
    raise torch.OutOfMemoryError("CUDA out of memory.\nTried to allocate 40 GiB")


def unfit(p: Problem) -> Side:
    raise Unfit("it wants wider experts")


def slow(p: Problem) -> Side:
    def forward() -> Tensor:
        while True:
            time.sleep(0.01)

    return Side(forward=forward, backward=lambda out: [])


def bench(path: Path, peers: Sequence[Peer], *more: str) -> dict[str, Any]:
    """The sides of the one cell that it measured."""
    given = ["--cpu", "--shapes", SHAPE, "--routing", "uniform", "--seconds", "0.001", "--json", str(path), *more]
    gpu_layer.main(given, peers=peers)
    (cell,) = json.loads(path.read_text())["cells"].values()
    sides: dict[str, Any] = cell["sides"]
    return sides


OURS, EAGER = Peer(name="moe_kernels", build=ours), Peer(name="transformers eager", build=eager)


def test_a_wrong_side_is_refused_by_name_and_one_that_fails_or_is_missing_stops_nobody(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sides = bench(
        tmp_path / "r.json",
        [
            OURS,
            Peer(name="wrong", build=changed(lambda w2: w2 * 1.5)),
            Peer(name="poisonous", build=changed(lambda w2: w2 * float("nan"))),
            Peer(name="raising", build=raises),
            Peer(name="narrow", build=unfit),
            Peer(name="absent", build=raises, module="no_such_module", install="pip install absent"),
            EAGER,
        ],
    )
    assert {name: result["status"] for name, result in sides.items()} == {
        "moe_kernels": "ok",
        "wrong": "refused",
        "poisonous": "refused",
        "raising": "failed",
        "narrow": "unfit",
        "transformers eager": "ok",
    }
    assert not {"ms", "speed_up"} & (sides["wrong"].keys() | sides["poisonous"].keys())
    assert sides["transformers eager"]["speed_up"]["full"] == pytest.approx(
        sides["transformers eager"]["ms"]["full"] / sides["moe_kernels"]["ms"]["full"]
    )
    printed = capsys.readouterr().out
    assert "wrong is refused: its w2 gradient is off by 5.0e-01 (limit 2.0e-02)" in printed
    assert "poisonous is refused: its w2 gradient is not finite" in printed
    assert "raising failed: OutOfMemoryError: CUDA out of memory.\n" in printed
    assert "narrow cannot run this: it wants wider experts" in printed
    assert "absent is not installed: pip install absent" in printed


def test_where_ours_is_wrong_nobody_gets_a_speed_up(tmp_path: Path) -> None:
    wrong = Peer(name="moe_kernels", build=changed(torch.zeros_like))
    sides = bench(tmp_path / "r.json", [wrong, EAGER])
    assert sides["transformers eager"]["status"] == "ok"
    assert "speed_up" not in sides["transformers eager"]


def test_every_peer_of_this_machine_agrees_or_says_why_not(tmp_path: Path) -> None:
    sides = bench(tmp_path / "r.json", gpu_layer.all_peers())
    assert {"moe_kernels", "moe_kernels, path sorted", "transformers grouped_mm", "transformers eager"} <= {
        name for name, result in sides.items() if result["status"] == "ok"
    }
    assert all(result["status"] in ("ok", "unfit") for result in sides.values()), sides
    assert all(result["deterministic"] for result in sides.values() if "deterministic" in result)
    for bound in ("dense SwiGLU, same FLOPs", "cuBLAS bmm, balanced"):
        assert "speed_up" not in sides[bound]
        assert sides[bound]["bound_vs_ours"]["full"] > 0
    assert sides["transformers eager"]["version"] == transformers.__version__


def test_two_runs_with_different_bits_are_not_called_repeatable() -> None:
    noisy = Peer(name="noisy", build=changed(lambda w2: w2 * (1 + 1e-2 * torch.rand_like(w2))))
    p = problem()
    result = attempt(noisy, p, expected=reference(p), device=Cpu(), seconds=0.001, box=60)
    assert result["status"] == "ok"
    assert not result["deterministic"]
    add_ratios(result, p.shape, card=None, ours=None, bound=False)
    assert " NO " in line("noisy", result)


def test_the_reference_is_the_oracle_and_its_gradients_in_double_precision() -> None:
    p = problem("20,5,3,12,10", torch.float64)
    out = moe_kernels.experts_reference(p.x_TD, p.w13_EGD, p.w2_EDF, p.index_TK, p.weights_TK)
    exact = [out.detach(), *torch.autograd.grad(out, p.leaves, p.grad_out_TD)]
    for name, got, want in zip(NAMES, reference(p, dtype=torch.float64), exact, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12, msg=name)


def test_an_error_in_any_of_the_five_tensors_is_found_and_named() -> None:
    p = problem()
    expected = reference(p)
    assert disagreement(expected, expected, dtype=p.x_TD.dtype) == (0.0, None)
    for place, name in enumerate(NAMES):
        got = [tensor.clone() for tensor in expected]
        got[place][-1] += 1
        assert name in str(disagreement(got, expected, dtype=p.x_TD.dtype)[1])
        got[place] = got[place][:-1]
        assert "has shape" in str(disagreement(got, expected, dtype=p.x_TD.dtype)[1])


def test_resuming_keeps_what_was_measured_and_adds_what_was_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gpu_layer, "commit", lambda: "abc")
    first = bench(tmp_path / "r.json", [OURS])
    both = bench(tmp_path / "r.json", [OURS, EAGER], "--resume")
    assert both["moe_kernels"] == first["moe_kernels"]
    assert both["transformers eager"]["status"] == "ok"
    monkeypatch.setattr(gpu_layer, "commit", lambda: "def")
    with pytest.raises(SystemExit, match=r"taken with commit 'abc', and this is 'def'"):
        bench(tmp_path / "r.json", [OURS, EAGER], "--resume")


def test_a_side_that_ended_the_process_is_named_and_not_tried_again(tmp_path: Path) -> None:
    path, shape = tmp_path / "r.json", parse_shape(SHAPE)
    report = Report(path, about={"card": "any"}, resume=False)
    report.sides(shape, "uniform", card=None)["crashing"] = {"status": "running"}
    report.save()
    sides = Report(path, about={"card": "any"}, resume=True).sides(shape, "uniform", card=None)
    assert sides["crashing"] == {"status": "failed", "reason": "the process ended while this ran"}


def test_a_side_that_takes_the_device_down_ends_the_run_and_is_in_the_report(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def lost(self: Cpu) -> None:
        raise RuntimeError("an illegal memory access was encountered")

    monkeypatch.setattr(Cpu, "clean", lost)
    with pytest.raises(SystemExit, match="crashing took the device down; the same command with --resume goes on"):
        bench(tmp_path / "r.json", [Peer(name="crashing", build=raises), OURS])
    assert json.loads((tmp_path / "r.json").read_text())["cells"].popitem()[1]["sides"].keys() == {"crashing"}


def test_what_does_not_end_is_stopped_after_its_box_and_the_next_is_tried(tmp_path: Path) -> None:
    sides = bench(tmp_path / "r.json", [Peer(name="slow", build=slow), Peer(name="next", build=unfit)], "--box", "1")
    assert sides["slow"]["reason"] == "OverTime: it took more than 1 s (--box)"
    assert sides["next"]["status"] == "unfit"


def test_no_side_begins_when_the_time_is_over(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    given = ["--cpu", "--minutes", "0.0101", "--box", "0.6", "--json", str(tmp_path / "r.json")]
    gpu_layer.main(given, peers=[Peer(name="slow", build=slow), OURS])
    assert "sides were left for want of time; the same command with --resume" in capsys.readouterr().out


def test_without_a_gpu_the_command_says_what_it_needs_and_what_works_here(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit, match=r"measures one CUDA device.*\n.*--cpu"):
        gpu_layer.main([])


@pytest.mark.parametrize("given", ["qwen@8192", "qwen3-30b-a3b@many", "1,2,3", "8,2,4,16,16", "0,4,2,16,16"])
def test_a_shape_that_cannot_be_is_refused_with_the_way_to_write_one(given: str) -> None:
    with pytest.raises(argparse.ArgumentTypeError, match=f"'{given}': "):
        parse_shape(given)


def test_every_named_shape_can_be_parsed_and_the_default_is_among_them() -> None:
    assert len({str(parse_shape(text)) for text in ALL}) == len(ALL)
    assert all(parse_shape(text).name for text in DEFAULT)


def test_zipf_routing_prefers_the_first_experts_and_never_names_one_twice() -> None:
    shape = parse_shape("4000,64,4,16,16")
    for routing, low, high in (("uniform", 0.05, 0.08), ("zipf", 0.8, 1.0)):
        index_TK = draw_experts(shape, routing, generator=torch.Generator().manual_seed(0))  # type: ignore[arg-type]
        assert (index_TK.sort(dim=-1).values.diff(dim=-1) > 0).all()
        assert low < (index_TK == 0).sum().item() / shape.tokens < high


def test_memory_is_counted_from_the_inputs_with_x_and_without_the_output() -> None:
    p = problem()

    class Counting(Cpu):
        held = iter((1000, 1000 + p.x_TD.nbytes + 700))

        def allocated(self) -> int:
            return next(self.held)

        def peak(self) -> int:
            return 5000

    out_and_hidden = by_autograd(lambda: p.x_TD * 1, [p.x_TD], p.grad_out_TD)
    result = memory(out_and_hidden, p, Counting())
    assert result == {"kept_bytes": 700 + p.x_TD.nbytes, "peak_bytes": 4000}


def test_a_median_is_of_the_step_alone_over_as_many_runs_as_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 0.0
    monkeypatch.setattr("bench.kernels.device.time.perf_counter", lambda: now)

    def pass_time(seconds: float) -> None:
        nonlocal now
        now += seconds

    prepared: list[int] = []

    def prepare() -> int:
        pass_time(30)
        prepared.append(0)
        return 0

    for budget, runs in ((0.01, 3), (2.1, 8), (1000, 100)):
        prepared.clear()
        ms = median_ms(lambda ready: pass_time(0.25), prepare, device=Cpu(), seconds=budget)
        assert ms == pytest.approx(250)
        assert len(prepared) == 1 + max(runs // 4, 1) + runs


def test_the_goal_is_held_to_the_roofline_of_the_card() -> None:
    shape, card = parse_shape("llama-moe-3.5b-4of16@32768"), CARDS["NVIDIA H100 80GB HBM3"]
    floors = {"forward": 2.240, "backward": 4.480, "full": 6.720, "inference": 2.240}
    for share, word in ((0.56, "reached"), (0.54, "missed")):
        result = {"status": "ok", "ms": {name: ms / share for name, ms in floors.items()}, "deterministic": True}
        result["kept_bytes"] = saved_bytes(shape)
        add_ratios(result, shape, card=card, ours=None, bound=False)
        assert f"goal: 0.55 of the roofline: {share:.3f}, {word}" in str(verdict(shape, "uniform", result))
    assert verdict(shape, "zipf", result) is None
    assert result["tflops"] == pytest.approx(0.54 * 989.4, rel=1e-3)
