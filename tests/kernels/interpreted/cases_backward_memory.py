"""What the Triton backward reads and writes: nothing around its inputs and outputs, and all of what lies past 2^31
elements. Run by ``test_interpreted.py``."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from backward_problems import DEVICE, assert_equal_bits, gradients, small_problem
from far import BLOCKS, FAR, assert_close, far_tile, half, index, normal
from moe_kernels.backward_kernels import router_gradient_kernel, weight_gradient_kernel, x_gradient_kernel
from moe_kernels.down_backward_kernel import down_backward_kernel
from problems import make_problem
from torch import Tensor

CANARY, MARGIN = 12345.0, 4096


def amid(tensor: Tensor, value: float) -> tuple[Tensor, Tensor]:
    """A contiguous copy with ``value`` before and behind it, and the buffer of both."""
    buffer = torch.full((tensor.numel() + 2 * MARGIN,), value, dtype=tensor.dtype, device=DEVICE)
    return buffer[MARGIN:-MARGIN].view(tensor.shape).copy_(tensor), buffer


@pytest.fixture
def canaries(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Tensor]]:
    """Every ``torch.empty`` of floats holds NaN and lies between canaries, which must be alive at the end."""
    buffers: list[Tensor] = []
    empty = torch.empty

    def guarded(*shape: Any, **options: Any) -> Tensor:
        plain = empty(*shape, **options)
        if not plain.is_floating_point():
            return plain
        tensor, buffer = amid(plain.fill_(float("nan")), CANARY)
        buffers.append(buffer)
        return tensor

    monkeypatch.setattr(torch, "empty", guarded)
    yield buffers
    for buffer in buffers:
        assert (buffer[:MARGIN] == CANARY).all()
        assert (buffer[-MARGIN:] == CANARY).all()


@pytest.mark.parametrize("separate", [False, True])
def test_the_kernels_write_all_of_their_outputs_and_nothing_else(separate: bool, canaries: list[Tensor]) -> None:
    p = make_problem(37, 5, top_k=2, hidden=21, width=13).rounded(torch.float32)
    gate, up = (half.contiguous() for half in p.w13_EGD[:3].to(DEVICE).chunk(2, dim=1))
    weights = {"w13_EGD": gate, "w3": up} if separate else {"w13_EGD": p.w13_EGD[:3].to(DEVICE)}
    absent = {"top_k_index_TK": p.top_k_index_TK.clamp(max=3).to(DEVICE), "w2_EDF": p.w2_EDF[:3].to(DEVICE)}
    hidden_MG = torch.full((74, 26), float("nan"), device=DEVICE)
    hidden_MG[: int((p.top_k_index_TK < 3).sum())] = 0.5
    got = gradients(p, hidden_MG=hidden_MG, **weights, **absent)
    intermediates = ("grad_hidden", "act_scaled", "ds_partial", "rows of dx")
    assert len(canaries) == len(got) + len(intermediates)
    for name, grad in got.items():
        assert grad.isfinite().all(), name


def test_memory_around_the_inputs_never_reaches_a_gradient() -> None:
    p = small_problem()
    names = ("x_TD", "w13_EGD", "w2_EDF", "top_k_weights_TK", "grad_out_TD")
    poisoned = {name: amid(getattr(p, name), float("nan"))[0] for name in names}
    assert_equal_bits(gradients(p, **poisoned), gradients(p))


def test_a_token_or_an_expert_of_nan_spoils_no_other() -> None:
    p = make_problem(40, 4, top_k=1, hidden=24, width=12).rounded(torch.float32)
    p.top_k_index_TK[0] = 2
    expected = gradients(p)
    x_TD, w2_EDF = p.x_TD.clone(), p.w2_EDF.clone()
    x_TD[0] = float("nan")
    w2_EDF[2] = float("nan")
    got = gradients(p.replaced(x_TD=x_TD, w2_EDF=w2_EDF))
    others_T, others_E = p.top_k_index_TK[:, 0] != 2, torch.tensor([0, 1, 3])
    for name, kept in {"dx": others_T, "dweights": others_T, "dw13": others_E, "dw2": others_E}.items():
        assert torch.equal(got[name][kept], expected[name][kept]), name


# Past 2^31 elements. Memory is mapped but not touched: only a few pages of these gigabytes exist.


def far_column(row: int, *, rows: int, expert: int, experts: int) -> dict[str, Any]:
    """:func:`far_tile` and one column tile, by pointer."""
    return far_tile(row, rows=rows, expert=expert, experts=experts) | {"n_col_tiles": 1, "ALIGN": 1, "TMA": False}


def first_columns(hidden: Tensor) -> Tensor:
    """The first 16 columns of gate and of up."""
    gate, up = hidden.chunk(2, 1)
    return torch.cat([gate[:, :16], up[:, :16]], 1)


def swiglu_backward(hidden: Tensor, grad_act: Tensor) -> tuple[Tensor, Tensor]:
    """The activation and the gradient of ``[gate | up]``, in fp64."""
    leaf = hidden.double().requires_grad_()
    gate, up = leaf.chunk(2, 1)
    act = torch.nn.functional.silu(gate) * up
    return act.detach(), torch.autograd.grad(act, leaf, grad_act.double())[0]


def test_rows_past_two_billion_elements_are_found() -> None:
    row, width, depth = 2**20, 2**11, 16
    tile, rows = far_column(row, rows=10, expert=0, experts=1), slice(row, row + 10)
    grad_out_MD, hidden_MG, w2 = half(row + 16, depth), half(row + 16, 2 * width), normal(1, depth, width)
    act_MF, grad_hidden_MG = half(row + 16, width), half(row + 16, 2 * width)
    grad_out_MD[rows], hidden_MG[rows] = normal(10, depth), normal(10, 2 * width)
    ds_MN = torch.empty(row + 16, 2**11, device=DEVICE)
    down_backward_kernel[(1,)](
        grad_out_ptr=grad_out_MD,
        w2_ptr=w2,
        hidden_ptr=hidden_MG,
        weights_ptr=None,
        ds_partial_ptr=ds_MN,
        act_scaled_ptr=act_MF,
        grad_hidden_ptr=grad_hidden_MG,
        flat_M=None,
        stride_gt=depth,
        D=depth,
        F=width,
        K=1,
        **tile | {"n_col_tiles": 2**11},
    )
    grad_act = grad_out_MD[rows].double() @ w2[0, :, :16].double()
    act, grad_near = swiglu_backward(first_columns(hidden_MG[rows]), grad_act)
    assert_close(act_MF[rows, :16], act)
    assert_close(first_columns(grad_hidden_MG[rows]), grad_near)
    assert_close(ds_MN[rows, 0], (grad_act * act).sum(1))

    w13, dx_MD = normal(1, 2 * width, 2**11) / 64, half(row + 16, 2**11)
    grad_hidden_MG[rows] = normal(10, 2 * width)
    x_gradient_kernel[(1,)](
        grad_hidden_ptr=grad_hidden_MG,
        w13_ptr=w13,
        dx_ptr=dx_MD,
        stride_we=0,
        up_offset=width * 2**11,
        D=2**11,
        F=width,
        **tile,
    )
    assert_close(dx_MD[rows, :16], grad_hidden_MG[rows].double() @ w13[0, :, :16].double())


def test_experts_past_two_billion_elements_are_found() -> None:
    depth, width, tile = 2**10, 2**20, far_column(0, rows=10, expert=2, experts=3)
    grad_out_TD, w2, hidden_MG = normal(10, depth) / 32, half(3, depth, width), half(10, 2 * width)
    w2[2, :, :16], hidden_MG[:, :16], hidden_MG[:, width : width + 16] = normal(depth, 16), 1, 2
    act_MF, grad_hidden_MG = half(10, width), half(10, 2 * width)
    down_backward_kernel[(1,)](
        grad_out_ptr=grad_out_TD,
        w2_ptr=w2,
        hidden_ptr=hidden_MG,
        weights_ptr=None,
        ds_partial_ptr=None,
        act_scaled_ptr=act_MF,
        grad_hidden_ptr=grad_hidden_MG,
        flat_M=None,
        stride_gt=depth,
        D=depth,
        F=width,
        K=1,
        **tile,
    )
    grad_act = grad_out_TD.double() @ w2[2, :, :16].double()
    _, grad_near = swiglu_backward(first_columns(hidden_MG), grad_act)
    assert_close(first_columns(grad_hidden_MG), grad_near)

    gate, up, grad_MG, w13 = normal(16, 16), normal(16, 16) + 1, normal(10, 32), half(3, FAR)
    w13[2, :256], w13[2, 256:512], w13[0, :256] = gate.flatten(), up.flatten(), up.flatten()
    exact = grad_MG.double() @ torch.cat([gate, up]).double()
    for expert, up_offset in ((2, 256), (0, 2 * FAR)):
        dx_MD = half(16, 16)
        x_gradient_kernel[(1,)](
            grad_hidden_ptr=grad_MG if expert else grad_MG.roll(16, 1),
            w13_ptr=w13,
            dx_ptr=dx_MD,
            stride_we=FAR,
            up_offset=up_offset,
            D=16,
            F=16,
            **far_column(0, rows=10, expert=expert, experts=3),
        )
        assert_close(dx_MD[:10], exact)


def test_tokens_past_two_billion_elements_are_found() -> None:
    grad_out_TD, w2, hidden_MG = half(3, FAR), normal(1, 16, 16) / 4, normal(3, 32)
    grad_out_TD[:, :16] = normal(3, 16)
    grad_hidden_MG = half(16, 32)
    down_backward_kernel[(1,)](
        grad_out_ptr=grad_out_TD,
        w2_ptr=w2,
        hidden_ptr=hidden_MG,
        weights_ptr=None,
        ds_partial_ptr=None,
        act_scaled_ptr=None,
        grad_hidden_ptr=grad_hidden_MG,
        flat_M=index(4, 2, 1),
        stride_gt=FAR,
        D=16,
        F=16,
        K=2,
        **far_column(0, rows=3, expert=0, experts=1),
    )
    _, exact = swiglu_backward(hidden_MG, grad_out_TD[[2, 1, 0], :16].double() @ w2[0].double())
    assert_close(grad_hidden_MG[:3], exact)


def launch_weight_gradient(left: Tensor, right: Tensor, grad: Tensor, **rest: Any) -> None:
    """The first tile of each expert."""
    weight_gradient_kernel[(len(rest["offset_E1"]) - 1,)](
        left_ptr=left,
        right_ptr=right,
        grad_ptr=grad,
        stride_lm=left.stride(0),
        stride_rm=right.stride(0),
        n_row_tiles=1,
        n_col_tiles=1,
        K=1,
        **rest | BLOCKS | {"ALIGN": 1},
    )


@pytest.mark.parametrize("gather_left", [True, False])
def test_rows_and_tokens_of_a_weight_gradient_past_two_billion_elements_are_found(gather_left: bool) -> None:
    row, order = 2**20, [2, 0, 1]
    sorted_MC, token_TC, flat_M = half(row + 3, 2**12), half(3, FAR), torch.empty(row + 3, dtype=torch.int32)
    sorted_MC[row:, :16], token_TC[:, :16], flat_M[row:] = normal(3, 16), normal(3, 16) + 1, index(*order).cpu()
    left, right = (token_TC, sorted_MC) if gather_left else (sorted_MC, token_TC)
    grad = half(16, 16)
    size = {"R": 16, "C": 16, "split": 16, "jump": 0}
    routing = {"flat_M": flat_M.to(DEVICE), "offset_E1": index(row, row + 3), "GATHER_LEFT": gather_left}
    launch_weight_gradient(left, right, grad, **size, **routing)
    token, there = token_TC[order, :16].double(), sorted_MC[row:, :16].double()
    assert_close(grad, token.t() @ there if gather_left else there.t() @ token)


def test_weight_gradients_past_two_billion_elements_are_written() -> None:
    left, right, grad = normal(10, 16), normal(10, 16) + 1, half(3, 2**15, 2**15)
    routing = {"flat_M": None, "offset_E1": index(0, 3, 3, 10), "GATHER_LEFT": True}
    launch_weight_gradient(left, right, grad, R=16, C=2**15, split=2**15, jump=0, **routing)
    assert_close(grad[0, :16, :16], left[:3].double().t() @ right[:3].double())
    assert (grad[1, :16, :16] == 0).all()
    assert_close(grad[2, :16, :16], left[3:].double().t() @ right[3:].double())
    routing["offset_E1"] = index(0, 10)
    launch_weight_gradient(left, right, grad, R=16, C=16, split=8, jump=2 * FAR - 128, **routing)
    exact = left.double().t() @ right.double()
    assert_close(torch.cat([grad[0].flatten()[:128], grad[2].flatten()[:128]]).view(16, 16), exact)


def test_partial_sums_past_two_billion_elements_are_found() -> None:
    row, columns = 2**21, 2**10
    ds_MN, ds = torch.empty(row + 1, columns, device=DEVICE), torch.empty(1, device=DEVICE)
    ds_MN[row] = torch.arange(columns)
    router_gradient_kernel[(1,)](
        ds_partial_ptr=ds_MN,
        ds_ptr=ds,
        inverse_TK=index(row),
        offset_E1=index(0, row + 1),
        M=1,
        E=1,
        n_col_tiles=columns,
        BLOCK_M=1,
        BLOCK_N=columns,
    )
    assert ds.item() == columns * (columns - 1) / 2
