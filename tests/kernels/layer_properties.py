"""What every path of the experts layer must do, as functions of the layer; their names say it.

``test_autograd.py`` asks it of the CPU paths and ``interpreted/cases_layer.py`` of Triton's.

Shapes: T tokens, D hidden, F width of one expert, G = 2F, E experts, K top-k, M routed or sorted rows.
"""

import gc
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from itertools import chain, combinations

import pytest
import torch
from moe_kernels.autograd import Path
from moe_kernels.experts import experts_layer, experts_sorted
from moe_kernels.reference import experts_reference
from problems import INPUTS, NAMES, Problem, assert_as_accurate_as_torch, assert_layer_accurate, make_problem
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils.checkpoint import checkpoint


@dataclass(frozen=True, kw_only=True)
class Subject:
    """A path, the dtype that its exact comparisons run in, and its device."""

    path: Path
    dtype: torch.dtype
    device: str = "cpu"

    def layer(self, *tensors: Tensor) -> Tensor:
        return experts_layer(*tensors, path=self.path)

    def run(self, problem: Problem, layer: object = None, **options: object) -> dict[str, Tensor]:
        return problem.run(layer or self.layer, self.dtype, device=self.device, **options)  # type: ignore[arg-type]

    def assert_accurate(self, problem: Problem, *, slack: float = 4) -> None:
        assert_layer_accurate(problem, self.layer, self.dtype, slack=slack, device=self.device)

    def assert_close(self, got: Tensor, expected: Tensor, name: str) -> None:
        tolerance = 1000 * torch.finfo(self.dtype).eps
        torch.testing.assert_close(got, expected, rtol=tolerance, atol=tolerance, msg=name)


def an_expert_named_twice_by_one_token_counts_twice(s: Subject) -> None:
    p = make_problem(6, 3, top_k=2, hidden=8, width=4)
    p.top_k_index_TK[:, 1] = p.top_k_index_TK[:, 0]
    s.assert_accurate(p)


def an_absent_expert_adds_nothing_and_gets_no_gradient(s: Subject) -> None:
    p = make_problem(12, 4, top_k=3, hidden=16, width=8)
    p.top_k_index_TK[::3, 0] = 4
    p.top_k_index_TK[5] = 4
    s.assert_accurate(p)
    got = s.run(p)
    assert (got["out"][5] == 0).all()
    assert (got["dx"][5] == 0).all()
    assert (got["dweights"][p.top_k_index_TK == 4] == 0).all()
    everything = s.run(p.replaced(top_k_index_TK=torch.full_like(p.top_k_index_TK, 4)))
    assert all((tensor == 0).all() for tensor in everything.values())


def a_routing_weight_of_zero_still_gets_its_gradient(s: Subject) -> None:
    p = make_problem(12, 4, top_k=2, hidden=16, width=8)
    p.top_k_weights_TK[::2, 1] = 0
    p.top_k_weights_TK[3] = 0
    s.assert_accurate(p)
    assert (s.run(p)["dweights"] != 0).all()


def an_expert_without_tokens_gets_zeros_not_none(s: Subject) -> None:
    p = make_problem(20, 8, top_k=2, hidden=16, width=8, spread="first half")
    got = s.run(p)
    assert (got["dw13"][4:] == 0).all()
    assert (got["dw2"][4:] == 0).all()
    assert (got["dw13"][:4] != 0).any(-1).all()


def no_tokens_at_all_give_gradients_of_zero(s: Subject) -> None:
    got = s.run(make_problem(0, 4, top_k=2, hidden=16, width=8))
    assert got["out"].shape == got["dx"].shape == (0, 16)
    assert (got["dw13"] == 0).all()
    assert (got["dw2"] == 0).all()


def equal_inputs_give_equal_bits(s: Subject) -> None:
    p = make_problem(48, 4, top_k=3, hidden=40, width=24)
    first, second = s.run(p), s.run(p)
    for name in NAMES:
        assert torch.equal(first[name], second[name]), name


def a_graph_can_be_walked_twice(s: Subject) -> None:
    p = make_problem(20, 4, top_k=2, hidden=16, width=8)
    leaves = [getattr(p, name).to(s.device, s.dtype).requires_grad_() for name in INPUTS]
    out = s.layer(*leaves[:3], p.top_k_index_TK.to(s.device), leaves[3])
    grad_out = p.grad_out_TD.to(s.device, s.dtype)
    first, second = (torch.autograd.grad(out, leaves, grad_out, retain_graph=True) for _ in range(2))
    assert all(map(torch.equal, first, second))


def relabelling_the_experts_changes_nothing_but_the_order_of_their_gradients(s: Subject) -> None:
    p = make_problem(12, 3, top_k=2, hidden=24, width=8)
    old_E = torch.tensor([2, 0, 1])
    relabelled = p.replaced(
        w13_EGD=p.w13_EGD[old_E], w2_EDF=p.w2_EDF[old_E], top_k_index_TK=old_E.argsort()[p.top_k_index_TK]
    )
    before, after = s.run(p), s.run(relabelled)
    for name in NAMES:
        s.assert_close(after[name], before[name][old_E] if name in ("dw13", "dw2") else before[name], name)


def permuting_the_tokens_permutes_the_output_and_leaves_the_weight_gradients(s: Subject) -> None:
    p = make_problem(12, 3, top_k=2, hidden=24, width=8)
    order_T = torch.randperm(12, generator=torch.Generator().manual_seed(1))
    rows = ("x_TD", "top_k_index_TK", "top_k_weights_TK", "grad_out_TD")
    before, after = s.run(p), s.run(p.replaced(**{name: getattr(p, name)[order_T] for name in rows}))
    for name in NAMES:
        s.assert_close(after[name], before[name] if name in ("dw13", "dw2") else before[name][order_T], name)


def any_gradient_can_be_left_out(s: Subject) -> None:
    p = make_problem(9, 2, top_k=2, hidden=16, width=8)
    expected = s.run(p)
    for wanted in chain.from_iterable(combinations(NAMES[1:], count) for count in range(4)):
        got = s.run(p, wanted=wanted)
        assert got.keys() == {"out", *wanted}
        for name, tensor in got.items():
            s.assert_close(tensor, expected[name], f"{name} of {wanted}")


def every_tensor_may_have_any_strides(s: Subject) -> None:
    p = make_problem(9, 2, top_k=2, hidden=16, width=8)
    p = p.replaced(grad_out_TD=p.grad_out_TD[:1, :1].expand(9, 16))
    plain = s.run(p)

    def columns(tensor: Tensor) -> Tensor:
        return torch.cat([tensor, torch.full_like(tensor, 1)], -1)[..., : tensor.shape[-1]]

    def transposed(tensor: Tensor) -> Tensor:
        return tensor.transpose(-1, -2).contiguous().transpose(-1, -2)

    for change in (columns, transposed):

        def strided(*tensors: Tensor, change: object = change) -> Tensor:
            changed = [change(tensor) for tensor in tensors]  # type: ignore[operator]
            assert not any(tensor.is_contiguous() for tensor in changed)
            return s.layer(*changed)

        got = s.run(p, strided)
        for name in NAMES:
            s.assert_close(got[name], plain[name], f"{name}, {change.__name__}")
    one_token = s.run(p.replaced(x_TD=p.x_TD[:1].repeat(9, 1)))
    expanded = s.run(p, lambda x, *rest: s.layer(x[:1].expand(9, 16), *rest))
    assert torch.equal(expanded["out"], one_token["out"])


def a_second_derivative_is_refused(s: Subject) -> None:
    p = make_problem(6, 3, top_k=2, hidden=8, width=4)
    x, w13, w2, weights = (getattr(p, name).to(s.device, s.dtype).requires_grad_() for name in INPUTS)
    out = s.layer(x, w13, w2, p.top_k_index_TK.to(s.device), weights)
    (grad,) = torch.autograd.grad(out.sum(), x, create_graph=True)
    with pytest.raises(NotImplementedError, match="second derivatives are not computed"):
        grad.sum().backward()


def under_autocast_the_gemms_run_in_bf16_and_gradients_keep_the_dtypes_of_the_inputs(s: Subject) -> None:
    p = make_problem(40, 4, top_k=2, hidden=48, width=24).rounded(torch.float32)

    def under_autocast(layer: object) -> dict[str, Tensor]:
        def run(*tensors: Tensor) -> Tensor:
            with torch.autocast(tensors[0].device.type, torch.bfloat16):
                return layer(*tensors)  # type: ignore[operator, no-any-return]

        return p.run(run, torch.float32, device=s.device)

    got = under_autocast(s.layer)
    assert all(tensor.dtype is torch.float32 for tensor in got.values())
    exact = p.run(experts_reference, torch.float64)
    error = (got["out"] - exact["out"]).norm() / exact["out"].norm()
    assert error > 1e-3, "the GEMMs did not run in bf16"
    slack = torch.finfo(torch.bfloat16).eps
    assert_as_accurate_as_torch(got, plain=under_autocast(experts_reference), exact=exact, slack=slack)


def a_backward_inside_autocast_computes_in_the_dtype_of_its_forward(s: Subject) -> None:
    p = make_problem(20, 4, top_k=2, hidden=16, width=8).rounded(torch.float32)
    leaves = [getattr(p, name).to(s.device).requires_grad_() for name in INPUTS]
    out = s.layer(*leaves[:3], p.top_k_index_TK.to(s.device), leaves[3])
    grad_out = p.grad_out_TD.to(s.device)
    expected = torch.autograd.grad(out, leaves, grad_out, retain_graph=True)
    with torch.autocast(leaves[0].device.type, torch.bfloat16):
        assert all(map(torch.equal, torch.autograd.grad(out, leaves, grad_out), expected))


def gradient_checkpointing_gives_the_same_bits(s: Subject) -> None:
    p = make_problem(12, 3, top_k=2, hidden=24, width=8)
    plain = s.run(p)
    again = s.run(p, partial(checkpoint, s.layer, use_reentrant=False))
    assert all(torch.equal(again[name], plain[name]) for name in NAMES)
    # The re-entrant kind supports .backward() only.
    leaves = [getattr(p, name).to(s.device, s.dtype).requires_grad_() for name in INPUTS]
    index_TK = p.top_k_index_TK.to(s.device)
    out = checkpoint(s.layer, *leaves[:3], index_TK, leaves[3], use_reentrant=True)
    out.backward(p.grad_out_TD.to(s.device, s.dtype))
    for name, leaf in zip(NAMES[1:], leaves, strict=True):
        assert torch.equal(leaf.grad.cpu(), plain[name]), name


def what_is_kept_is_tokens_pre_activations_the_routing_and_the_parameters_themselves(s: Subject) -> None:
    p = make_problem(20, 4, top_k=2, hidden=16, width=8)
    w13, w2 = (nn.Parameter(t.to(s.device, s.dtype)) for t in (p.w13_EGD, p.w2_EDF))
    x, index_TK = p.x_TD.to(s.device, s.dtype), p.top_k_index_TK.to(s.device)
    saved: list[Tensor] = []

    def keep(tensor: Tensor) -> Tensor:
        saved.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        s.layer(x, w13, w2, index_TK, p.top_k_weights_TK.float().to(s.device).requires_grad_())
    weights = [t for t in saved if any(t.untyped_storage()._cdata == w.untyped_storage()._cdata for w in (w13, w2))]
    assert list(map(id, weights)) == [id(w13), id(w2)], "a view of a weight is kept"
    assert all(t.untyped_storage().nbytes() == t.nbytes for t in saved), "a view keeps more than it shows"
    tokens, rows, experts = 20, 20 * 2, 4
    pre_activations, routing = rows * 16, 12 * rows + 4 * (experts + 1)
    if s.path == "dense":
        pre_activations, routing = tokens * experts * 16, (8 + 4) * rows
    kept = sum(t.nbytes for t in saved) - w13.nbytes - w2.nbytes
    assert kept == s.dtype.itemsize * (tokens * 16 + pre_activations) + routing


def no_weight_lives_from_forward_to_backward_when_its_owner_lets_go(s: Subject) -> None:
    p = make_problem(20, 4, top_k=2, hidden=16, width=8).rounded(s.dtype)
    expected = s.run(p)
    source = p.w13_EGD.to(s.device), p.w2_EDF.to(s.device)
    w13, w2 = (nn.Parameter(w.clone()) for w in source)
    x, weights = (t.to(s.device).requires_grad_() for t in (p.x_TD, p.top_k_weights_TK))
    out = s.layer(x, w13, w2, p.top_k_index_TK.to(s.device), weights)
    gathered = [StorageWeakRef(w.untyped_storage()) for w in (w13, w2)]
    for w in (w13, w2):
        w.data = torch.empty(0, dtype=s.dtype, device=s.device)  # what ZeRO-3 does after a module's forward
    if s.path == "triton" and s.device == "cpu":
        gc.collect()  # a launch of the interpreter leaves a cycle that holds its arguments
    assert all(storage.expired() for storage in gathered)
    for w, whole in zip((w13, w2), source, strict=True):
        w.data = whole.clone()
    out.backward(p.grad_out_TD.to(s.device))
    for name, leaf in zip(NAMES[1:], (x, w13, w2, weights), strict=True):
        assert torch.equal(leaf.grad.cpu(), expected[name]), name


def an_index_of_32_bits_does(s: Subject) -> None:
    p = make_problem(12, 4, top_k=2, hidden=16, width=8)
    wide, narrow = s.run(p), s.run(p.replaced(top_k_index_TK=p.top_k_index_TK.int()))
    assert all(torch.equal(narrow[name], wide[name]) for name in NAMES)


def rows_that_come_sorted_are_computed_and_padding_is_zero_both_ways(
    s: Subject, *, counts: Sequence[int] = (7, 0, 16, 4), padding: int = 3
) -> None:
    rows, counts_E = sum(counts), torch.tensor(counts)
    p = make_problem(rows + padding, len(counts), top_k=1, hidden=24, width=8).rounded(s.dtype)
    past = torch.arange(rows + padding) >= rows
    nan = float("nan")
    x_MD, grad_out_MD = (t.masked_fill(past[:, None], nan) for t in (p.x_TD, p.grad_out_TD))
    index_MK = torch.repeat_interleave(torch.arange(len(counts)), counts_E)[:, None]
    real = p.replaced(
        x_TD=p.x_TD[:rows],
        grad_out_TD=p.grad_out_TD[:rows],
        top_k_index_TK=index_MK,
        top_k_weights_TK=torch.ones_like(p.top_k_weights_TK[:rows]),
    )
    plain, exact = real.run(experts_reference, s.dtype), real.run(experts_reference, torch.float64)
    for separate in (False, True):
        x, w13, w2 = (t.to(s.device).requires_grad_() for t in (x_MD.clone(), p.w13_EGD.clone(), p.w2_EDF.clone()))
        gate, up = (w13[:, :8], w13[:, 8:]) if separate else (w13, None)
        out = experts_sorted(x, gate, w2, counts_E.to(s.device), w3_EFD=up, path=s.path)
        grads = torch.autograd.grad(out, (x, w13, w2), grad_out_MD.to(s.device))
        whole = dict(zip(NAMES, [t.detach().cpu() for t in (out, *grads)], strict=False))
        assert (whole["out"][rows:] == 0).all()
        assert (whole["dx"][rows:] == 0).all()
        got = whole | {"out": whole["out"][:rows], "dx": whole["dx"][:rows]}
        assert_as_accurate_as_torch(got, plain=plain, exact=exact, slack=32 * torch.finfo(s.dtype).eps)


PROPERTIES = (
    an_expert_named_twice_by_one_token_counts_twice,
    an_absent_expert_adds_nothing_and_gets_no_gradient,
    a_routing_weight_of_zero_still_gets_its_gradient,
    an_expert_without_tokens_gets_zeros_not_none,
    no_tokens_at_all_give_gradients_of_zero,
    equal_inputs_give_equal_bits,
    a_graph_can_be_walked_twice,
    relabelling_the_experts_changes_nothing_but_the_order_of_their_gradients,
    permuting_the_tokens_permutes_the_output_and_leaves_the_weight_gradients,
    any_gradient_can_be_left_out,
    every_tensor_may_have_any_strides,
    a_second_derivative_is_refused,
    under_autocast_the_gemms_run_in_bf16_and_gradients_keep_the_dtypes_of_the_inputs,
    a_backward_inside_autocast_computes_in_the_dtype_of_its_forward,
    gradient_checkpointing_gives_the_same_bits,
    what_is_kept_is_tokens_pre_activations_the_routing_and_the_parameters_themselves,
    no_weight_lives_from_forward_to_backward_when_its_owner_lets_go,
    an_index_of_32_bits_does,
)
