"""What the Triton forward reads and writes: nothing behind a tensor, nothing beside its rows, offsets past 2^31."""

import ctypes
import mmap

import pytest
import torch
from far import FAR, assert_close, far_tile, half, normal
from forward_problems import BY_POINTER, DEVICE, INTERPRETED, SMALL, run
from moe_kernels import forward
from moe_kernels.config import Tile
from moe_kernels.forward_kernels import combine_kernel, down_kernel, up_kernel, zero_padding_kernel
from moe_kernels.routing import build_routing
from problems import make_problem
from torch import Tensor


def test_nothing_behind_a_tensor_is_read() -> None:
    """Every input ends at a page that a read of would end the process at."""
    if not INTERPRETED:
        pytest.skip("pages are the processor's")
    p = make_problem(21, 3, top_k=2, hidden=19, width=11).rounded(torch.float32)
    names = ("x_TD", "w13_EGD", "w2_EDF", "top_k_weights_TK")
    out, hidden, routing = run(p, experts=3, **{name: before_a_wall(getattr(p, name)) for name in names})
    assert torch.equal(out, run(p, experts=3)[0])
    act_MF, y_MD = before_a_wall(hidden[:, :11]), torch.empty(42, 19)
    grid, launch = forward.row_tile_launch("down", routing, rows=42, columns=19, depth=11, like=act_MF)
    down_kernel[grid](
        act_ptr=act_MF, w2_ptr=before_a_wall(p.w2_EDF), y_ptr=y_MD, D=19, F=11, ALIGN_F=1, **BY_POINTER, **launch
    )
    forward.combine(before_a_wall(y_MD), out, weights_TK=None, routing=routing)


def before_a_wall(tensor: Tensor) -> Tensor:
    """A contiguous copy whose last byte is the last one before memory that must not be touched."""
    size = tensor.numel() * tensor.element_size()
    wall = -(-size // mmap.PAGESIZE) * mmap.PAGESIZE
    memory = mmap.mmap(-1, wall + mmap.PAGESIZE)
    address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    assert ctypes.CDLL(None).mprotect(ctypes.c_void_p(address + wall), mmap.PAGESIZE, 0) == 0
    copy = torch.frombuffer(memory, dtype=tensor.dtype, count=tensor.numel(), offset=wall - size)
    return copy.view(tensor.shape).copy_(tensor)


class Canary:
    """A tensor inside a larger buffer, whose remainder must keep its value."""

    def __init__(self, *shape: int, dtype: torch.dtype = torch.float32) -> None:
        size = torch.Size(shape).numel()
        self.buffer = torch.full((size + 8192,), 12345.0, dtype=dtype, device=DEVICE)
        self.tensor = self.buffer[4096 : 4096 + size].view(shape)

    def assert_alive(self, *, written: int) -> None:
        """Only the first ``written`` rows have changed, and all of them."""
        end = 4096 + written * self.tensor.stride(0)
        assert (self.buffer[:4096] == 12345).all()
        assert (self.buffer[end:] == 12345).all()
        assert (self.buffer[4096:end] != 12345).all()


@pytest.mark.parametrize(
    "shape", [SMALL, Tile(block_m=64, block_n=64, block_k=64, num_warps=4, num_stages=2, group_m=8)]
)
def test_the_kernels_write_their_rows_and_nothing_else(shape: Tile, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(forward, "tile", lambda kernel, **_: shape)
    tokens, experts, top_k, hidden, width = 37, 3, 2, 21, 13
    rows, p = tokens * top_k, make_problem(37, 5, top_k=2, hidden=21, width=13).rounded(torch.float32)
    index_TK = p.top_k_index_TK.clamp(max=3).to(DEVICE)  # the last two experts are absent
    routing = build_routing(index_TK, experts=experts)
    here = int((index_TK < 3).sum())
    hidden_MG, act_MF, y_MD = Canary(rows, 2 * width), Canary(rows, width), Canary(rows, hidden)
    out_TD, padded_MD = Canary(tokens, hidden), Canary(rows, hidden)
    x_TD, w13, w2_EDF = (t.to(DEVICE) for t in (p.x_TD, p.w13_EGD, p.w2_EDF))
    grid, launch = forward.row_tile_launch("up", routing, rows=rows, columns=width, depth=hidden, like=x_TD)
    up_kernel[grid](
        x_ptr=x_TD,
        w13_ptr=w13,
        hidden_ptr=hidden_MG.tensor,
        act_ptr=act_MF.tensor,
        flat_M=routing.flat_M,
        stride_xt=hidden,
        stride_we=2 * width * hidden,
        up_offset=width * hidden,
        D=hidden,
        F=width,
        ALIGN_F=1,
        K=top_k,
        TMA=False,
        **launch,
    )
    hidden_MG.assert_alive(written=here)
    act_MF.assert_alive(written=here)
    grid, launch = forward.row_tile_launch("down", routing, rows=rows, columns=hidden, depth=width, like=x_TD)
    down_kernel[grid](
        act_ptr=act_MF.tensor, w2_ptr=w2_EDF, y_ptr=y_MD.tensor, D=hidden, F=width, ALIGN_F=1, **BY_POINTER, **launch
    )
    act_MF.assert_alive(written=here)
    y_MD.assert_alive(written=here)
    weights_TK = p.top_k_weights_TK.to(DEVICE)
    forward.combine(y_MD.tensor, out_TD.tensor, weights_TK=weights_TK, routing=routing)
    out_TD.assert_alive(written=tokens)
    forward.zero_padding(padded_MD.tensor, routing)
    assert (padded_MD.tensor[here:] == 0).all()
    padded_MD.tensor[here:] = 12345
    padded_MD.assert_alive(written=0)


def test_rows_past_two_billion_elements_are_found() -> None:
    row, wide, narrow = 2**20, 2048, 16
    x_MD, w13, w2 = half(row + 16, narrow), normal(1, 2 * wide, narrow) / 4, normal(1, wide, narrow)
    hidden_MG, act_MF = half(row // 2 + 8, 4 * wide).view(-1, 2 * wide), half(row + 16, wide)
    x_MD[row : row + 10] = normal(10, narrow)
    up_kernel[(wide // 16,)](
        x_ptr=x_MD,
        w13_ptr=w13,
        hidden_ptr=hidden_MG,
        act_ptr=act_MF,
        flat_M=None,
        n_col_tiles=wide // 16,
        stride_xt=narrow,
        stride_we=2 * wide * narrow,
        up_offset=wide * narrow,
        D=narrow,
        F=wide,
        ALIGN_F=1,
        K=1,
        TMA=False,
        **far_tile(row, rows=10, expert=0, experts=1),
    )
    exact = x_MD[row : row + 10].double() @ w13[0].double().t()
    assert_close(hidden_MG[row : row + 10], exact)
    act = torch.nn.functional.silu(exact[:, :wide]) * exact[:, wide:]
    assert_close(act_MF[row : row + 10], act)
    narrow_act_MF, y_MD = half(row + 16, narrow), half(row + 16, wide)
    narrow_act_MF[row : row + 10] = normal(10, narrow)
    down_kernel[(wide // 16,)](
        act_ptr=narrow_act_MF,
        w2_ptr=w2,
        y_ptr=y_MD,
        n_col_tiles=wide // 16,
        D=wide,
        F=narrow,
        ALIGN_F=1,
        **BY_POINTER,
        **far_tile(row, rows=10, expert=0, experts=1),
    )
    assert_close(y_MD[row : row + 10], narrow_act_MF[row : row + 10].double() @ w2[0].double().t())
    w2, y_MD = normal(1, narrow, wide) / 32, half(row + 16, narrow)
    down_kernel[(1,)](
        act_ptr=act_MF,
        w2_ptr=w2,
        y_ptr=y_MD,
        n_col_tiles=1,
        D=narrow,
        F=wide,
        ALIGN_F=1,
        **BY_POINTER,
        **far_tile(row, rows=10, expert=0, experts=1),
    )
    assert_close(y_MD[row : row + 10], act_MF[row : row + 10].double() @ w2[0].double().t())


def test_experts_past_two_billion_elements_are_found() -> None:
    depth, width = 2**14, 2**15
    x_TD, w13, w2 = normal(10, depth) / 128, half(3, 2 * width, depth), half(3, 2**16, depth)
    for rows in (w13[2, :16], w13[2, width : width + 16], w2[2, :16]):
        rows.copy_(normal(16, depth))
    hidden_MG, act_MF, y_MD = half(16, 2 * width), half(16, width), half(16, 2**16)

    def launch_up(expert: int, up_offset: int) -> Tensor:
        up_kernel[(1,)](
            x_ptr=x_TD,
            w13_ptr=w13,
            hidden_ptr=hidden_MG,
            act_ptr=act_MF,
            flat_M=None,
            n_col_tiles=1,
            stride_xt=depth,
            stride_we=FAR,
            up_offset=up_offset,
            D=depth,
            F=width,
            ALIGN_F=1,
            K=1,
            TMA=False,
            **far_tile(0, rows=10, expert=expert, experts=3),
        )
        return torch.cat([hidden_MG[:10, :16], hidden_MG[:10, width : width + 16]], 1)

    exact = x_TD.double() @ torch.cat([w13[2, :16], w13[2, width : width + 16]]).double().t()
    assert_close(launch_up(2, width * depth), exact)
    w13[0, :16] = w13[2, width : width + 16]
    assert_close(launch_up(0, 2 * FAR), exact.roll(16, 1))
    down_kernel[(1,)](
        act_ptr=x_TD,
        w2_ptr=w2,
        y_ptr=y_MD,
        n_col_tiles=1,
        D=2**16,
        F=depth,
        ALIGN_F=1,
        **BY_POINTER,
        **far_tile(0, rows=10, expert=2, experts=3),
    )
    assert_close(y_MD[:10, :16], x_TD.double() @ w2[2, :16].double().t())


def test_tokens_past_two_billion_elements_are_found() -> None:
    x_TD, y_MD, out_TD = half(3, FAR), half(3, FAR), half(3, FAR)
    x_TD[:, :16], y_MD[:, :64] = normal(3, 16), normal(3, 64)
    w13, act_MF = normal(1, 32, 16) / 4, half(16, 16)
    up_kernel[(1,)](
        x_ptr=x_TD,
        w13_ptr=w13,
        hidden_ptr=None,
        act_ptr=act_MF,
        flat_M=torch.tensor([4, 2, 1], dtype=torch.int32, device=DEVICE),
        n_col_tiles=1,
        stride_xt=FAR,
        stride_we=0,
        up_offset=256,
        D=16,
        F=16,
        ALIGN_F=1,
        K=2,
        TMA=False,
        **far_tile(0, rows=3, expert=0, experts=1),
    )
    gate, up = (x_TD[[2, 1, 0], :16].double() @ w13[0].double().t()).chunk(2, 1)
    assert_close(act_MF[:3], torch.nn.functional.silu(gate) * up)
    combine_kernel[(3, 1)](
        y_ptr=y_MD,
        weight_ptr=None,
        out_ptr=out_TD,
        inverse_TK=torch.tensor([1, 2, 0], dtype=torch.int32, device=DEVICE),
        offset_E1=torch.tensor([0, 3], dtype=torch.int32, device=DEVICE),
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
        out_ptr=out_MD,
        offset_E1=torch.tensor([0, 2**9 + 1], dtype=torch.int32, device=DEVICE),
        M=2**9 + 2,
        D=2**22,
        E=1,
        BLOCK_M=1,
        BLOCK_D=2**20,
    )
    assert (out_MD[-1] == 0).all()
    assert (out_MD[-2] == 1).all()
