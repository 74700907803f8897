"""Which path computes the layer and in which dtype, and what is refused."""

from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import pytest
import torch
from children import run_python
from moe_kernels import autograd, experts, experts_layer
from moe_kernels.experts import experts_sorted
from problems import Problem, assert_layer_accurate, make_problem
from torch import Tensor

requires_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
P = make_problem(8, 4, top_k=2, hidden=16, width=6).rounded(torch.float32)


def call(**changes: Any) -> Tensor:
    """The layer on a small problem with some arguments changed."""
    tensors = {name: tensor for name, tensor in vars(P).items() if name != "grad_out_TD"}
    return experts_layer(**tensors | changes)


def call_sorted(**changes: Any) -> Tensor:
    gate, up = P.w13_EGD.chunk(2, dim=1)
    arguments = {"x_MD": P.x_TD, "w13": gate, "w2_EDF": P.w2_EDF, "counts_E": torch.tensor([2, 0, 5, 1])}
    return experts_sorted(**arguments | {"w3_EFD": up} | changes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"x_TD": P.x_TD[0]}, r"expected x \(T, D\) and w13 \(E, 2F, D\), got \(16,\) and \(4, 12, 16\)"),
        ({"x_TD": P.x_TD[:, :9]}, r"w13 has shape \(4, 12, 16\), expected \(4, 12, 9\)"),
        ({"w13_EGD": P.w13_EGD[:, :11]}, r"w13 has shape \(4, 11, 16\), expected \(4, 10, 16\)"),
        ({"w2_EDF": P.w2_EDF.transpose(1, 2)}, r"w2 has shape \(4, 6, 16\), expected \(4, 16, 6\)"),
        ({"top_k_index_TK": P.top_k_index_TK[:5]}, r"top_k_index has shape \(5, 2\), expected \(8, 2\)"),
        ({"top_k_index_TK": P.top_k_index_TK[:, 0]}, r"top_k_index has shape \(8,\), expected \(8, 8\)"),
        ({"top_k_weights_TK": P.top_k_weights_TK[:, :1]}, r"top_k_weights has shape \(8, 1\), expected \(8, 2\)"),
        ({"w2_EDF": P.w2_EDF.to("meta")}, "w2 is on meta and x on cpu; move one of them"),
        ({"top_k_index_TK": P.top_k_index_TK.float()}, r"top_k_index is torch\.float32, expected int32 or int64"),
        ({"top_k_index_TK": P.top_k_index_TK.short()}, r"top_k_index is torch\.int16, expected int32 or int64"),
        ({"w13_EGD": P.w13_EGD.int()}, r"w13 is torch\.int32, expected a floating dtype"),
        ({"path": "fast"}, "path is 'fast', expected one of sorted, dense, triton"),
    ],
)
def test_what_does_not_fit_is_named(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call(**changes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"counts_E": torch.tensor([2, 0, 5])}, r"counts has shape \(3,\), expected \(4,\)"),
        ({"counts_E": torch.rand(4)}, r"counts is torch\.float32, expected int32 or int64"),
        ({"w3_EFD": P.w13_EGD[:, :5]}, r"w3 has shape \(4, 5, 16\), expected \(4, 6, 16\)"),
        ({"w3_EFD": None}, r"w2 has shape \(4, 16, 6\), expected \(4, 16, 3\)"),
        ({"path": "dense"}, "path='dense' needs a top_k_index"),
    ],
)
def test_what_does_not_fit_sorted_rows_is_named(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call_sorted(**changes)


def test_triton_on_cpu_is_refused_with_the_fix() -> None:
    pytest.importorskip("triton")
    with pytest.raises(ValueError, match="x is on cpu; use path='sorted' there, or run Triton's interpreter"):
        call(path="triton")
    with pytest.raises(ValueError, match=r"in fp32, fp16 or bf16, not in torch\.float64; use 'sorted'"):
        call(w13_EGD=P.w13_EGD.double(), path="triton")


@pytest.mark.parametrize(("width", "path"), [(2, "dense"), (200, "sorted")])
def test_narrow_experts_take_the_dense_path_and_wide_ones_the_sorted_path(width: int, path: str) -> None:
    p = make_problem(16, 4, top_k=2, hidden=8, width=width)
    with patch.object(autograd, "experts_forward", wraps=autograd.experts_forward) as forward:
        experts_layer(p.x_TD, p.w13_EGD, p.w2_EDF, p.top_k_index_TK, p.top_k_weights_TK)
    assert path in forward.call_args.args


@pytest.mark.parametrize(
    ("device", "major", "dtype", "installed", "path"),
    [
        ("cuda", 9, torch.bfloat16, True, "triton"),
        ("cuda", 8, torch.float16, True, "triton"),
        ("cuda", 12, torch.float32, True, "triton"),
        ("cuda", 9, torch.float64, True, "sorted"),
        ("cuda", 9, torch.bfloat16, False, "sorted"),
        ("cuda", 7, torch.float16, True, "sorted"),
        ("meta", 0, torch.bfloat16, True, "sorted"),
        ("cpu", 0, torch.bfloat16, True, None),
    ],
)
def test_a_device_has_its_path(
    device: str, major: int, dtype: torch.dtype, installed: bool, path: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(experts, "_TRITON_INSTALLED", installed)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: SimpleNamespace(major=major))
    on_device = type("OnDevice", (), {"is_cuda": device == "cuda", "device": torch.device(device)})
    assert experts._path_of_device(on_device, dtype) == path  # type: ignore[arg-type]


def test_the_gemms_run_in_the_dtype_of_autocast_or_of_the_weights_and_fp64_stays() -> None:
    x, w = torch.zeros(1), torch.zeros(1, dtype=torch.bfloat16)
    assert experts.compute_dtype(x, w) is torch.bfloat16
    with torch.autocast("cpu", torch.float16):
        assert experts.compute_dtype(x, w) is torch.float16
        assert experts.compute_dtype(x, w.double()) is torch.float64
    out = call(w13_EGD=P.w13_EGD.bfloat16(), w2_EDF=P.w2_EDF.bfloat16())
    assert out.dtype is torch.float32
    torch.testing.assert_close(out, call(), rtol=0.05, atol=0.05)


def test_a_layer_on_the_meta_device_has_its_shapes() -> None:
    out = call(**{name: tensor.to("meta") for name, tensor in vars(P).items() if name != "grad_out_TD"})
    assert (out.shape, out.device.type) == ((8, 16), "meta")
    assert call_sorted(path="sorted").shape == (8, 16)


def test_the_package_imports_only_torch_and_trains_and_knows_its_tiles_without_triton() -> None:
    code = """
import sys, moe_kernels
assert not {"triton", "transformers", "deepspeed"} & set(sys.modules)
sys.modules["triton"] = None
import torch
from moe_kernels.config import tile
assert tile("up", rows_per_expert=1, columns=1, depth=1, itemsize=2, arch=90)
x = torch.randn(4, 8, requires_grad=True)
index, weights = torch.tensor([[0, 1]] * 4), torch.rand(4, 2)
moe_kernels.experts_layer(x, torch.randn(3, 10, 8), torch.randn(3, 8, 5), index, weights).sum().backward()
assert x.grad is not None
"""
    run_python("-c", code)


@requires_gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_on_cuda_the_layer_agrees_with_fp64_without_a_word_to_the_host(dtype: torch.dtype) -> None:
    def layer(*tensors: Tensor) -> Tensor:
        torch.cuda.set_sync_debug_mode("error")
        try:
            return experts_layer(*tensors)
        finally:
            torch.cuda.set_sync_debug_mode("default")

    problem: Problem = make_problem(200, 8, top_k=2, hidden=64, width=48)
    assert_layer_accurate(problem, layer, dtype, slack=0.5, device="cuda")
