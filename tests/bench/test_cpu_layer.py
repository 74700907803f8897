"""The benchmark of the experts layer on a CPU: what it writes, and what it refuses to write."""

import json
import sys
from pathlib import Path

import pytest
import torch

from bench.kernels import cpu_layer
from bench.kernels.shapes import make_problem, parse_shape


def test_the_benchmark_writes_times_memory_and_agreement_of_every_side(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    file = tmp_path / "cpu.json"
    flags = ["--threads", "1", "--dtypes", "float32", "--shapes", "32,4,2,16,8", "--turns", "1", "--json", str(file)]
    monkeypatch.setattr(sys, "argv", ["cpu_layer.py", *flags])
    cpu_layer.main()
    rows = json.loads(file.read_text())["cells"][0]["rows"]
    assert list(rows) == [peer.name for peer in cpu_layer.PEERS]
    for name in ("moe_kernels", "transformers grouped_mm", "transformers eager", "transformers batched_mm"):
        assert rows[name]["error"] < 1e-6, name
        assert min(rows[name][key] for key in ("full_per_floor", "peak_bytes", "kept_bytes")) > 0, name


def test_the_benchmark_gives_no_figure_to_a_side_that_is_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(p: object) -> cpu_layer.Side:
        side = cpu_layer.ours(p)  # type: ignore[arg-type]
        return cpu_layer.Side(forward=lambda: side.forward() * 1.01, backward=side.backward)

    monkeypatch.setattr(cpu_layer, "PEERS", (cpu_layer.Peer(name="wrong", build=wrong), *cpu_layer.PEERS[-2:]))
    rows = cpu_layer.bench(parse_shape("32,4,2,16,8"), dtype=torch.float32, turns=1)
    assert "disagrees with the reference" in rows["wrong"]["reason"]
    assert "full_ms" not in rows["wrong"]


def test_kept_bytes_are_tokens_pre_activations_and_twelve_bytes_a_row_of_fp32_weights() -> None:
    p = make_problem(parse_shape("32,16,2,16,8"), "uniform", dtype=torch.float32, device="cpu")
    x, hidden, indices, offset = 32 * 16 * 4, 64 * 16 * 4, 64 * 12, 17 * 4
    assert cpu_layer.kept_bytes(cpu_layer.ours(p), p) == x + hidden + indices + offset
