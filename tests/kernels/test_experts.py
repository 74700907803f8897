from types import SimpleNamespace

import pytest
import torch
from children import run_python
from moe_kernels import experts_forward, experts_layer, experts_reference
from problems import make_problem, relative_error
from torch import nn

requires_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


class Experts(nn.Module):
    def __init__(self, act_fn: object = None) -> None:
        super().__init__()
        p = make_problem(1, 4, top_k=2, hidden=16, width=8).rounded(torch.float32)
        self.gate_up_proj, self.down_proj = nn.Parameter(p.w13_EGD), nn.Parameter(p.w2_EDF)
        self.act_fn = nn.SiLU() if act_fn is None else act_fn


def call(module: nn.Module) -> torch.Tensor:
    p = make_problem(10, 4, top_k=2, hidden=16, width=8).rounded(torch.float32)
    return experts_forward(module, p.x_TD, p.top_k_index_TK, p.top_k_weights_TK)


def test_a_module_with_silu_is_computed() -> None:
    assert call(Experts()).shape == (10, 16)


def test_another_activation_is_refused_by_name() -> None:
    with pytest.raises(NotImplementedError, match="activation is GELU, and only SiLU"):
        call(Experts(nn.GELU()))


@pytest.mark.parametrize(
    ("flag", "value"),
    [
        ("is_transposed", True),
        ("has_bias", True),
        ("has_gate", False),
        ("is_concatenated", False),
        ("has_post_expert_norm", True),
        ("_is_expert_parallel", True),
    ],
)
def test_a_module_with_an_unsupported_feature_is_refused_with_the_reason_and_the_mend(flag: str, value: bool) -> None:
    module = Experts()
    setattr(module, flag, value)
    with pytest.raises(NotImplementedError, match=rf"{flag}={value}.*experts_implementation='grouped_mm'"):
        call(module)


def test_a_module_with_its_own_gate_function_is_refused() -> None:
    class Clamped(Experts):
        def _apply_gate(self, gate_up: torch.Tensor) -> torch.Tensor:
            return gate_up

    with pytest.raises(NotImplementedError, match="_apply_gate"):
        call(Clamped())


def test_the_package_imports_and_trains_where_triton_is_missing() -> None:
    code = """
import sys
sys.modules["triton"] = None
import torch, moe_kernels
assert "transformers" not in sys.modules
x = torch.randn(4, 8, requires_grad=True)
index, weights = torch.tensor([[0, 1]] * 4), torch.rand(4, 2)
moe_kernels.experts_layer(x, torch.randn(3, 10, 8), torch.randn(3, 8, 5), index, weights).sum().backward()
assert x.grad is not None
"""
    run_python("-c", code)


def test_importing_the_package_leaves_the_kernels_unimported() -> None:
    code = "import sys, moe_kernels; assert 'moe_kernels.grouped' not in sys.modules"
    run_python("-c", code)


@requires_gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_cuda_inference_and_cuda_training_agree_with_fp64(dtype: torch.dtype) -> None:
    p = make_problem(200, 8, top_k=2, hidden=64, width=48).rounded(dtype)
    cuda = SimpleNamespace(**{name: tensor.cuda() for name, tensor in vars(p).items()})
    exact = p.run(experts_reference, torch.float64)
    args = (cuda.w13_EGD, cuda.w2_EDF, cuda.top_k_index_TK, cuda.top_k_weights_TK)
    limit = 1e-5 if dtype is torch.float32 else 2e-2
    with torch.no_grad():
        assert relative_error(experts_layer(cuda.x_TD, *args).cpu(), exact["out"]) < limit
    x = cuda.x_TD.requires_grad_()
    experts_layer(x, *args).backward(cuda.grad_out_TD)
    assert relative_error(x.grad.cpu(), exact["dx"]) < limit
