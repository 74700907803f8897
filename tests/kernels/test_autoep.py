import copy
from pathlib import Path

import deepspeed
import pytest
import torch
from children import join
from deepspeed.module_inject.auto_ep_layer import permute_by_local_expert, unpermute_by_local_expert
from deepspeed.moe.ep_experts import GroupedExperts
from deepspeed.utils import safe_get_full_grad
from moe_kernels.autoep import use_in_deepspeed
from problems import assert_as_accurate_as_torch
from torch import Tensor, nn
from transformers import MixtralConfig, MixtralForCausalLM

from tests.warm_processes import spawn

RANKS = 2
NAMES = ("out", "x", "w1", "w2", "w3")


def grouped_experts(*, activation: str = "swiglu", dtype: torch.dtype = torch.float64) -> GroupedExperts:
    module = GroupedExperts(dim=16, hidden_dim=12, num_experts=5, use_grouped_mm=False, activation=activation)
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.3, generator=torch.Generator().manual_seed(0))
    return module.to(dtype)


def rows(count: int) -> Tensor:
    return torch.randn(count, 16, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def run(module: GroupedExperts, x: Tensor, counts: Tensor) -> dict[str, Tensor]:
    """The output and every gradient, by name."""
    module.zero_grad()
    x = x.clone().requires_grad_()
    out = module(x, counts)
    grad_out = torch.randn(out.shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    out.backward(grad_out.to(out.dtype))
    return dict(zip(NAMES, (out.detach(), x.grad, module.w1.grad, module.w2.grad, module.w3.grad), strict=True))


def assert_same(got: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    for name in NAMES:
        torch.testing.assert_close(
            got[name], expected[name], rtol=1e-10, atol=1e-10, msg=lambda m, n=name: f"{n}: {m}"
        )


@pytest.mark.parametrize("padding", [0, 7])
@pytest.mark.parametrize("counts", [[5, 0, 9, 1, 8], [0, 0, 23, 0, 0], [0, 0, 0, 0, 0], [1, 1, 1, 1, 1]], ids=str)
def test_the_experts_of_deepspeed_compute_the_same_over_ragged_rows(counts: list[int], padding: int) -> None:
    module, x = grouped_experts(), rows(sum(counts) + padding)
    x[sum(counts) :] = float("nan")
    expected = run(module, x, torch.tensor(counts))
    assert use_in_deepspeed(module) == 1
    got = run(module, x, torch.tensor(counts, dtype=torch.int32))
    assert_same(got, expected)
    assert not got["out"][sum(counts) :].any()
    assert not got["x"][sum(counts) :].any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_they_are_as_accurate_as_deepspeeds_loop(dtype: torch.dtype) -> None:
    counts, module = torch.tensor([5, 0, 9, 1, 8]), grouped_experts(dtype=dtype)
    x = rows(23).to(dtype)
    plain = run(module, x, counts)
    exact = run(copy.deepcopy(module).double(), x.double(), counts)
    use_in_deepspeed(module)
    assert_as_accurate_as_torch(run(module, x, counts), plain=plain, exact=exact, slack=torch.finfo(dtype).eps)


def test_rows_that_deepspeed_sorts_and_pads_itself_come_back_the_same() -> None:
    counts = torch.tensor([[2, 0, 3, 0, 1], [0, 0, 4, 1, 2]])  # from two ranks
    module, x = grouped_experts(), rows(13)

    def through(x: Tensor, counts: Tensor) -> Tensor:
        padded, order, aligned, length = permute_by_local_expert(x, counts)
        assert aligned.tolist() == [8] * 5  # an expert without rows has eight rows of zeros
        assert len(padded) > aligned.sum()
        return unpermute_by_local_expert(module(padded, aligned), order, length)

    def gradients() -> dict[str, Tensor]:
        module.zero_grad()
        leaf = x.clone().requires_grad_()
        out = through(leaf, counts)
        out.backward(torch.randn(out.shape, generator=torch.Generator().manual_seed(2), dtype=out.dtype))
        return dict(zip(NAMES, (out.detach(), leaf.grad, *(p.grad for p in module.parameters())), strict=True))

    expected = gradients()
    use_in_deepspeed(module)
    assert_same(gradients(), expected)


def test_parameters_names_and_state_dict_stay_and_a_second_call_changes_nothing() -> None:
    model = nn.ModuleDict({"first": grouped_experts(), "second": grouped_experts(), "other": nn.Linear(2, 2)})
    before = dict(model.named_parameters())
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    x, counts = rows(10), torch.tensor([2, 2, 2, 2, 2])
    assert use_in_deepspeed(model) == 2
    once = run(model["first"], x, counts)
    assert use_in_deepspeed(model) == 2
    assert all(torch.equal(once[name], tensor) for name, tensor in run(model["first"], x, counts).items())
    assert all(parameter is before[name] for name, parameter in model.named_parameters())
    assert model.state_dict().keys() == state.keys()
    model.load_state_dict(state)


def test_a_copy_computes_with_its_own_weights() -> None:
    module = grouped_experts()
    use_in_deepspeed(module)
    other = copy.deepcopy(module)
    with torch.no_grad():
        other.w2.zero_()
    assert not other(rows(5), torch.tensor([1] * 5)).any()
    assert module(rows(5), torch.tensor([1] * 5)).any()


def test_another_activation_is_refused_by_name_and_nothing_is_changed() -> None:
    model = nn.ModuleDict({"fine": grouped_experts(), "clamped": grouped_experts(activation="swiglu_clamped")})
    with pytest.raises(NotImplementedError, match="cannot run clamped: its activation is 'swiglu_clamped', and only"):
        use_in_deepspeed(model)
    assert "forward" not in vars(model["fine"])


def test_a_subclass_with_its_own_forward_is_refused() -> None:
    class Scaled(GroupedExperts):
        def forward(self, x: Tensor, num_tokens_per_expert: Tensor) -> Tensor:
            return 2 * super().forward(x, num_tokens_per_expert)

    with pytest.raises(NotImplementedError, match="Scaled overrides forward"):
        use_in_deepspeed(nn.Sequential(Scaled(dim=4, hidden_dim=4, num_experts=2)))


def test_a_model_that_deepspeed_has_not_converted_is_refused_with_the_fix() -> None:
    with pytest.raises(ValueError, match=r"Linear has no GroupedExperts; call it after deepspeed\.initialize"):
        use_in_deepspeed(nn.Linear(2, 2))


def two_steps(ids_BL: Tensor, *, ours: bool) -> dict[str, Tensor]:
    """The losses and every full gradient of two steps of a Mixtral, by name."""
    torch.manual_seed(0)
    config = MixtralConfig(
        vocab_size=64, hidden_size=32, intermediate_size=24, num_local_experts=4, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=64,
    )  # fmt: skip
    model = MixtralForCausalLM(config)
    settings = {
        "optimizer": {"type": "SGD", "params": {"lr": 0.5}},
        "train_micro_batch_size_per_gpu": 2,
        "gradient_clipping": 0.0,
        "steps_per_print": 1 << 30,
        "zero_optimization": {"stage": 3},
        "zero_allow_untested_optimizer": True,
        "expert_parallel": {"enabled": True, "autoep_size": RANKS, "preset_model": "mixtral"},
    }
    engine = pytest.importorskip("tasks.plugins.expert_parallel.engine")
    with engine.keyed_by_class_name():
        engine, *_ = deepspeed.initialize(model=model, model_parameters=model.parameters(), config=settings)
    if ours:
        assert use_in_deepspeed(engine) == 2
    results = {}
    for step in range(2):
        loss = engine(input_ids=ids_BL, labels=ids_BL, use_cache=False).loss
        engine.backward(loss)
        results[f"{step} loss"] = loss.detach().clone()
        results |= {f"{step} {name}": safe_get_full_grad(p).clone() for name, p in engine.module.named_parameters()}
        engine.step()
    engine.destroy()
    return results


def compare_steps(rank: int, folder: Path) -> None:
    join(rank, folder, ranks=RANKS)
    ids_BL = torch.randint(0, 64, (2, 24), generator=torch.Generator().manual_seed(rank))
    expected, got = two_steps(ids_BL, ours=False), two_steps(ids_BL, ours=True)
    assert any(".experts.w3" in name for name in got), list(got)
    assert all(tensor.any() for tensor in got.values())
    for name, tensor in got.items():
        torch.testing.assert_close(tensor, expected[name], rtol=1e-4, atol=1e-7, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.e2e
def test_steps_of_a_mixtral_under_autoep_and_zero3_have_the_same_losses_and_gradients(tmp_path: Path) -> None:
    spawn(compare_steps, (tmp_path,), nprocs=RANKS)
