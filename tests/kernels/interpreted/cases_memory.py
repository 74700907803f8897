"""What the Triton kernels read and write: nothing beside their tensors, and offsets past 2^31 elements are found.

Run by ``test_interpreted.py``.
"""

import ctypes
import mmap
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from moe_kernels import forward
from moe_kernels.autograd import experts_backward, experts_forward
from moe_kernels.backward_kernels import router_gradient_kernel, weight_gradient_kernel, x_gradient_kernel
from moe_kernels.config import Tile
from moe_kernels.down_backward_kernel import down_backward_kernel
from moe_kernels.experts import experts_sorted
from moe_kernels.forward_kernels import combine_kernel, down_kernel, up_kernel, zero_padding_kernel
from problems import INPUTS, make_problem, relative_error
from torch import Tensor

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
NAN, CANARY, MARGIN = float("nan"), 12345.0, 4096
FAR = 2**30  # elements, of which three rows pass 2^31
BLOCKS = {"BLOCK_M": 16, "BLOCK_N": 16, "BLOCK_K": 64, "GROUP_M": 1, "INTERPRETED": DEVICE == "cpu"}
BY_POINTER = {"ALIGN_F": 1, "TMA": False, "PERSISTENT": False, "BLOCK_E": 4}


def guarded(tensor: Tensor, around: float) -> tuple[Tensor, Tensor]:
    """A contiguous copy with ``around`` before it and a page behind it that ends the process when touched; and both.

    On a GPU, whose pages are not the process's, ``around`` lies behind it too.
    """
    size = tensor.numel() * tensor.element_size()
    if DEVICE == "cuda":
        buffer = torch.full((tensor.numel() + 2 * MARGIN,), around, dtype=tensor.dtype, device=DEVICE)
        return buffer[MARGIN:-MARGIN].view(tensor.shape).copy_(tensor), buffer
    wall = -(-size // mmap.PAGESIZE) * mmap.PAGESIZE + mmap.PAGESIZE
    memory = mmap.mmap(-1, wall + mmap.PAGESIZE)
    address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    assert ctypes.CDLL(None).mprotect(ctypes.c_void_p(address + wall), mmap.PAGESIZE, 0) == 0
    count = wall // tensor.element_size()
    buffer = torch.frombuffer(memory, dtype=tensor.dtype, count=count).fill_(around)
    return buffer[count - tensor.numel() :].view(tensor.shape).copy_(tensor), buffer


Guards = list[tuple[Tensor, Tensor]]


@pytest.fixture
def guards(monkeypatch: pytest.MonkeyPatch) -> Iterator[Guards]:
    """Every float tensor that is allocated holds NaN and is guarded; what lies around it must be intact at the end."""
    allocated: Guards = []

    def guard(plain: Tensor) -> Tensor:
        if not plain.is_floating_point() or plain.numel() == 0:
            return plain
        allocated.append(guarded(plain.fill_(NAN), CANARY))
        return allocated[-1][0]

    empty, new_empty = torch.empty, Tensor.new_empty
    monkeypatch.setattr(torch, "empty", lambda *shape, **options: guard(empty(*shape, **options)))
    monkeypatch.setattr(Tensor, "new_empty", lambda like, *shape, **options: guard(new_empty(like, *shape, **options)))
    yield allocated
    monkeypatch.undo()
    for tensor, buffer in allocated:
        start = (tensor.data_ptr() - buffer.data_ptr()) // buffer.element_size()
        assert (buffer[:start] == CANARY).all()
        assert (buffer[start + tensor.numel() :] == CANARY).all()


@pytest.mark.parametrize(
    "shape", [None, Tile(block_m=64, block_n=64, block_k=64, num_warps=4, num_stages=2, group_m=8)], ids=str
)
def test_the_layer_reads_nothing_beside_its_inputs_and_writes_all_of_its_rows_and_nothing_else(
    shape: Tile | None, guards: Guards, monkeypatch: pytest.MonkeyPatch
) -> None:
    if shape is not None:
        monkeypatch.setattr(forward, "tile", lambda kernel, **_: shape)
    p = make_problem(37, 5, top_k=2, hidden=21, width=13).rounded(torch.float32)
    p = p.replaced(w13_EGD=p.w13_EGD[:3], w2_EDF=p.w2_EDF[:3], top_k_index_TK=p.top_k_index_TK.clamp(max=3))
    rows, present = 74, int((p.top_k_index_TK < 3).sum())  # expert 3 is absent
    x, w13, w2, weights, grad_out = (guarded(getattr(p, name), NAN)[0] for name in (*INPUTS, "grad_out_TD"))
    args = x, w13, None, w2, p.top_k_index_TK.to(DEVICE), weights, None, "triton", True
    out, hidden, *routing = experts_forward(*args)
    grads = experts_backward(
        grad_out, x, w13, None, w2, hidden, None, weights, *routing, "triton", True, True, True, True
    )
    for tensor in (out, *grads):
        assert tensor.isfinite().all()
    by_row = [tensor for tensor, _ in guards if tensor.dim() == 2 and len(tensor) == rows]
    assert len(by_row) == 7  # hidden, act, y; grad_hidden, act_scaled, the partial sums, the rows of dx
    for tensor in by_row:
        assert tensor[:present].isfinite().all()
        assert tensor[present:].isnan().all()


def test_separate_projections_and_sorted_rows_stay_within_their_tensors_too(guards: Guards) -> None:
    p = make_problem(29, 3, top_k=1, hidden=21, width=13).rounded(torch.float32)
    gate, up = p.w13_EGD.chunk(2, dim=1)
    leaves = [guarded(t, NAN)[0].requires_grad_() for t in (p.x_TD, gate, p.w2_EDF, up)]
    counts_E = torch.tensor([7, 0, 17], device=DEVICE)
    out = experts_sorted(leaves[0], leaves[1], leaves[2], counts_E, w3_EFD=leaves[3], path="triton")
    grads = torch.autograd.grad(out, leaves, guarded(p.grad_out_TD, NAN)[0])
    for tensor in (out, *grads):
        assert tensor.isfinite().all()
    assert len(guards) >= 8


# Past 2^31 elements. Memory is mapped but not touched: only a few pages of these gigabytes exist.


def index(*values: int) -> Tensor:
    return torch.tensor(values, dtype=torch.int32, device=DEVICE)


def half(*shape: int) -> Tensor:
    """Unwritten fp16."""
    return torch.empty(*shape, dtype=torch.float16, device=DEVICE)


def normal(*shape: int) -> Tensor:
    """Random fp16 of order one."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0)).to(torch.float16).to(DEVICE)


def assert_close(got: Tensor, exact: Tensor) -> None:
    assert relative_error(got, exact) < torch.finfo(torch.float16).eps


def one_tile(row: int, *, rows: int, expert: int = 0, experts: int = 1) -> dict[str, Any]:
    """The shared arguments of a launch with one row tile of one expert and, first of all, one column tile."""
    offset_E1 = index(*[row] * (expert + 1), *[row + rows] * (experts - expert))
    maps = {"tile_expert_B": index(expert), "tile_row_B": index(row), "offset_E1": offset_E1}
    return maps | BLOCKS | {"n_row_tiles": 1, "n_col_tiles": 1, "E": experts}


def up(
    x: Tensor,
    w13: Tensor,
    hidden: Tensor | None,
    act: Tensor,
    *,
    tile: dict[str, Any],
    up_offset: int = 0,
    **rest: Any,
) -> None:
    """The first column tile of the up kernel; ``w13`` is (E, 2F, D)."""
    _, double, depth = w13.shape
    arguments = {"stride_xt": x.stride(0), "stride_we": w13.stride(0), "D": depth, "F": double // 2, "K": 1}
    up_kernel[(1,)](
        x_ptr=x,
        w13_ptr=w13,
        hidden_ptr=hidden,
        act_ptr=act,
        up_offset=up_offset or double // 2 * depth,
        ALIGN_F=1,
        TMA=False,
        **{"flat_M": None} | arguments | tile | rest,
    )


def down(act: Tensor, w2: Tensor, y: Tensor, *, tile: dict[str, Any]) -> None:
    """The first column tile of the down kernel."""
    _, model_dim, width = w2.shape
    down_kernel[(1,)](act_ptr=act, w2_ptr=w2, y_ptr=y, D=model_dim, F=width, **BY_POINTER, **tile)


def down_backward(
    grad_out: Tensor, w2: Tensor, hidden: Tensor, grad_hidden: Tensor, *, tile: dict[str, Any], **rest: Any
) -> None:
    """The first column tile of the down-projection's backward."""
    _, model_dim, width = w2.shape
    outputs = {"ds_partial_ptr": None, "act_scaled_ptr": None, "grad_hidden_ptr": grad_hidden}
    down_backward_kernel[(1,)](
        grad_out_ptr=grad_out,
        w2_ptr=w2,
        hidden_ptr=hidden,
        weights_ptr=None,
        stride_gt=grad_out.stride(0),
        D=model_dim,
        F=width,
        ALIGN=1,
        TMA=False,
        **outputs | {"flat_M": None, "K": 1} | tile | rest,
    )


def x_gradient(grad_hidden: Tensor, w13: Tensor, dx: Tensor, *, tile: dict[str, Any], **rest: int) -> None:
    """The first column tile of the gradient of x."""
    x_gradient_kernel[(1,)](grad_hidden_ptr=grad_hidden, w13_ptr=w13, dx_ptr=dx, ALIGN=1, TMA=False, **tile | rest)


def first_columns(hidden: Tensor) -> Tensor:
    """The first 16 columns of gate and of up."""
    return torch.cat([half[:, :16] for half in hidden.chunk(2, 1)], 1)


def swiglu(hidden: Tensor) -> Tensor:
    gate, up = hidden.double().chunk(2, 1)
    return torch.nn.functional.silu(gate) * up


def swiglu_backward(hidden: Tensor, grad_act: Tensor) -> Tensor:
    """The gradient of ``[gate | up]``, in fp64."""
    leaf = hidden.double().requires_grad_()
    return torch.autograd.grad(swiglu(leaf), leaf, grad_act.double())[0]


def test_rows_past_two_billion_elements_are_found_in_the_forward() -> None:
    row, wide, narrow = 2**20, 2**11, 16
    tile, rows = one_tile(row, rows=10), slice(row, row + 10)
    x_MD, w13 = half(row + 16, narrow), normal(1, 2 * wide, narrow) / 4
    hidden_MG, act_MF = half(row + 16, 2 * wide), half(row + 16, wide)
    x_MD[rows] = normal(10, narrow)
    up(x_MD, w13, hidden_MG, act_MF, tile=tile)
    exact = first_columns(x_MD[rows].double() @ w13[0].double().t())
    assert_close(first_columns(hidden_MG[rows]), exact)
    assert_close(act_MF[rows, :16], swiglu(exact))
    for width, model_dim in ((narrow, wide), (wide, narrow)):
        act, w2, y = half(row + 16, width), normal(1, model_dim, width) / width**0.5, half(row + 16, model_dim)
        act[rows] = normal(10, width)
        down(act, w2, y, tile=tile)
        assert_close(y[rows, :16], act[rows].double() @ w2[0, :16].double().t())


def test_rows_past_two_billion_elements_are_found_in_the_backward() -> None:
    row, width, depth = 2**20, 2**11, 16
    tile, rows = one_tile(row, rows=10), slice(row, row + 10)
    grad_out_MD, hidden_MG, w2 = half(row + 16, depth), half(row + 16, 2 * width), normal(1, depth, width)
    act_MF, grad_hidden_MG = half(row + 16, width), half(row + 16, 2 * width)
    grad_out_MD[rows], hidden_MG[rows] = normal(10, depth), normal(10, 2 * width)
    ds_MN = torch.empty(row + 16, 2**11, device=DEVICE)
    outputs = {"ds_partial_ptr": ds_MN, "act_scaled_ptr": act_MF, "n_col_tiles": 2**11}
    down_backward(grad_out_MD, w2, hidden_MG, grad_hidden_MG, tile=tile, **outputs)
    grad_act, near = grad_out_MD[rows].double() @ w2[0, :, :16].double(), first_columns(hidden_MG[rows])
    assert_close(act_MF[rows, :16], swiglu(near))
    assert_close(first_columns(grad_hidden_MG[rows]), swiglu_backward(near, grad_act))
    assert_close(ds_MN[rows, 0], (grad_act * swiglu(near)).sum(1))

    w13, dx_MD = normal(1, 2 * width, 2**11) / 64, half(row + 16, 2**11)
    grad_hidden_MG[rows] = normal(10, 2 * width)
    x_gradient(grad_hidden_MG, w13, dx_MD, tile=tile, stride_we=0, up_offset=width * 2**11, D=2**11, F=width)
    assert_close(dx_MD[rows, :16], grad_hidden_MG[rows].double() @ w13[0, :, :16].double())


def test_experts_past_two_billion_elements_are_found_in_the_forward() -> None:
    depth, width = 2**14, 2**15
    x_TD, w13, w2 = normal(10, depth) / 128, half(3, 2 * width, depth), half(3, 2**16, depth)
    for rows in (w13[2, :16], w13[2, width : width + 16], w2[2, :16]):
        rows.copy_(normal(16, depth))
    hidden_MG, act_MF, y_MD = half(16, 2 * width), half(16, width), half(16, 2**16)
    last, first = (one_tile(0, rows=10, expert=expert, experts=3) for expert in (2, 0))
    exact = x_TD.double() @ torch.cat([w13[2, :16], w13[2, width : width + 16]]).double().t()
    up(x_TD, w13, hidden_MG, act_MF, tile=last)
    assert_close(first_columns(hidden_MG[:10]), exact)
    w13[0, :16] = w13[2, width : width + 16]
    up(x_TD, w13, hidden_MG, act_MF, tile=first, up_offset=2 * FAR)
    assert_close(first_columns(hidden_MG[:10]), exact.roll(16, 1))
    down(x_TD, w2, y_MD, tile=last)
    assert_close(y_MD[:10, :16], x_TD.double() @ w2[2, :16].double().t())


def test_experts_past_two_billion_elements_are_found_in_the_backward() -> None:
    depth, width, tile = 2**10, 2**20, one_tile(0, rows=10, expert=2, experts=3)
    grad_out_TD, w2, hidden_MG = normal(10, depth) / 32, half(3, depth, width), half(10, 2 * width)
    w2[2, :, :16], hidden_MG[:, :16], hidden_MG[:, width : width + 16] = normal(depth, 16), 1, 2
    grad_hidden_MG = half(10, 2 * width)
    down_backward(grad_out_TD, w2, hidden_MG, grad_hidden_MG, tile=tile)
    grad_act = grad_out_TD.double() @ w2[2, :, :16].double()
    assert_close(first_columns(grad_hidden_MG), swiglu_backward(first_columns(hidden_MG), grad_act))

    gate, up, grad_MG, w13 = normal(16, 16), normal(16, 16) + 1, normal(10, 32), half(3, FAR)
    w13[2, :256], w13[2, 256:512], w13[0, :256] = gate.flatten(), up.flatten(), up.flatten()
    exact = grad_MG.double() @ torch.cat([gate, up]).double()
    for expert, up_offset in ((2, 256), (0, 2 * FAR)):
        dx_MD, grad = half(16, 16), grad_MG if expert else grad_MG.roll(16, 1)
        tile = one_tile(0, rows=10, expert=expert, experts=3)
        x_gradient(grad, w13, dx_MD, tile=tile, stride_we=FAR, up_offset=up_offset, D=16, F=16)
        assert_close(dx_MD[:10], exact)


def test_tokens_past_two_billion_elements_are_found() -> None:
    x_TD, y_MD, out_TD = half(3, FAR), half(3, FAR), half(3, FAR)
    x_TD[:, :16], y_MD[:, :64] = normal(3, 16), normal(3, 64)
    w13, w2, hidden_MG, act_MF = normal(1, 32, 16) / 4, normal(1, 16, 16) / 4, normal(3, 32), half(16, 16)
    tile, routed = one_tile(0, rows=3), {"flat_M": index(4, 2, 1), "K": 2}
    up(x_TD, w13, None, act_MF, tile=tile, **routed)
    assert_close(act_MF[:3], swiglu(x_TD[[2, 1, 0], :16].double() @ w13[0].double().t()))
    grad_hidden_MG = half(16, 32)
    down_backward(x_TD, w2, hidden_MG, grad_hidden_MG, tile=tile, **routed)
    assert_close(grad_hidden_MG[:3], swiglu_backward(hidden_MG, x_TD[[2, 1, 0], :16].double() @ w2[0].double()))
    combine_kernel[(3, 1)](
        y_ptr=y_MD,
        weight_ptr=None,
        out_ptr=out_TD,
        inverse_TK=index(1, 2, 0),
        offset_E1=index(0, 3),
        D=FAR,
        E=1,
        K=1,
        BLOCK_D=64,
    )
    assert torch.equal(out_TD[:, :64], y_MD[[1, 2, 0], :64])


def test_padding_past_two_billion_elements_is_zeroed() -> None:
    out_MD = half(2**9 + 2, 2**22)
    out_MD[-2:] = 1
    zero_padding_kernel[(2**9 + 2,)](
        out_ptr=out_MD, offset_E1=index(0, 2**9 + 1), M=2**9 + 2, D=2**22, E=1, BLOCK_M=1, BLOCK_D=2**20
    )
    assert (out_MD[-1] == 0).all()
    assert (out_MD[-2] == 1).all()


def weight_gradient(left: Tensor, right: Tensor, grad: Tensor, **rest: Any) -> None:
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
    weight_gradient(left, right, grad, **size, **routing)
    token, there = token_TC[order, :16].double(), sorted_MC[row:, :16].double()
    assert_close(grad, token.t() @ there if gather_left else there.t() @ token)


def test_weight_gradients_past_two_billion_elements_are_written() -> None:
    left, right, grad = normal(10, 16), normal(10, 16) + 1, half(3, 2**15, 2**15)
    routing = {"flat_M": None, "offset_E1": index(0, 3, 3, 10), "GATHER_LEFT": True}
    weight_gradient(left, right, grad, R=16, C=2**15, split=2**15, jump=0, **routing)
    assert_close(grad[0, :16, :16], left[:3].double().t() @ right[:3].double())
    assert (grad[1, :16, :16] == 0).all()
    assert_close(grad[2, :16, :16], left[3:].double().t() @ right[3:].double())
    routing["offset_E1"] = index(0, 10)
    weight_gradient(left, right, grad, R=16, C=16, split=8, jump=2 * FAR - 128, **routing)
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
