"""Two processes with the experts spread over them, held against a stock model in one, without DeepSpeed."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM

from tasks.moe import families, gate
from tasks.plugins.expert_parallel import engine as expert_parallel
from tasks.pretrain import trainable
from tasks.pretrain.checkpoints import store
from tasks.pretrain.checkpoints.manager import CheckpointManager
from tasks.pretrain.engine import configuration, interface, masters
from tasks.pretrain.job import TrainingError
from tasks.pretrain.loss.balance import Balancer
from tests.plugins.expert_parallel import expert_parallel_ranks as ranks
from tests.warm_processes import spawn_ranks

EXACT = [name for name, (_, dtype) in ranks.CASES.items() if dtype == torch.float32]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the two processes left."""
    left = tmp_path_factory.mktemp("ranks")
    spawn_ranks(ranks.main, (left,))
    return left


def reference(name: str) -> tuple[list[list[float]], dict[str, torch.Tensor]]:
    """The same training by torch alone: what ranks.train gives, and the weights after the last step."""
    params = ranks.settings(name)
    model = ranks.stock(name)
    groups = trainable.groups(model, params)
    optimizer = torch.optim.AdamW(groups, lr=params.learning_rate, betas=params.betas, eps=1.0)
    balancer, seen = Balancer(params, model), []
    for step in range(1, ranks.LAST + 1):
        what = next(what for last, what in params.phases if step <= last)
        trainable.require(model, trainable.TRAINED[what])
        balancer.begin()
        losses = [ranks.loss(model, ids_L[None], balancer) for ids_L in ranks.windows(step)]
        optimizer.zero_grad()
        torch.stack(losses).mean().backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), params.clip)
        optimizer.step()
        balancer.end()
        mean = torch.stack(losses).mean().item()
        seen.append([mean, norm.item(), *balancer.load_LE.flatten().tolist()])
    return seen, {key: parameter.detach() for key, parameter in model.named_parameters()}


@pytest.mark.e2e
@pytest.mark.parametrize("name", EXACT)
def test_losses_norms_loads_and_weights_are_those_of_a_stock_model_in_one_process(name: str, folder: Path) -> None:
    expected, weights = reference(name)
    seen = json.loads((folder / f"{name}.json").read_text())
    torch.testing.assert_close(torch.tensor(seen["before"] + seen["after"]), torch.tensor(expected), rtol=2e-6, atol=0)
    assert expected[-1][1] > ranks.settings(name).clip  # so that a wrong norm would have moved the weights
    start = dict(ranks.stock(name).named_parameters())
    last = load_file(folder / f"{name}-last.safetensors")
    torch.testing.assert_close(last, weights, rtol=1e-5, atol=1e-6)
    for key, tensor in last.items():
        assert (tensor - start[key]).abs().max() > 1e-3, f"{key} was not trained"


@pytest.mark.e2e
@pytest.mark.parametrize("name", list(ranks.CASES))
def test_a_restored_engine_goes_on_bit_for_bit_also_after_steps_that_are_given_up(name: str, folder: Path) -> None:
    seen = json.loads((folder / f"{name}.json").read_text())
    assert seen["resumed"] == seen["after"]
    saved, last, resumed = (load_file(folder / f"{name}-{kind}.safetensors") for kind in ("saved", "last", "resumed"))
    for key, tensor in last.items():
        assert tensor.dtype == torch.float32
        assert torch.equal(tensor, resumed[key]), key
        assert not torch.equal(tensor, saved[key]), key


@pytest.mark.e2e
def test_in_bfloat16_the_weights_handed_out_are_the_masters(folder: Path) -> None:
    for key, tensor in load_file(folder / "bfloat16-last.safetensors").items():
        assert bool((tensor != tensor.bfloat16().float()).any()), key
    expected, _ = reference("zero-1")  # the same in float32
    seen = json.loads((folder / "bfloat16.json").read_text())
    losses = torch.tensor([loss for loss, *_ in seen["before"] + seen["after"]])
    torch.testing.assert_close(losses, torch.tensor([loss for loss, *_ in expected]), rtol=2e-2, atol=0)


@pytest.mark.e2e
@pytest.mark.parametrize("name", EXACT)
def test_the_routers_are_read_as_those_of_the_stock_model(name: str, folder: Path) -> None:
    result = load_file(folder / f"{name}-choice.safetensors")
    torch.testing.assert_close(result, ranks.routed(ranks.stock(name)), rtol=1e-5, atol=1e-6)
    assert result["load"].sum() == 2 * ranks.LENGTH * 2  # layers x tokens x top_k


@pytest.mark.e2e
@pytest.mark.parametrize("name", EXACT)
def test_a_stock_model_with_the_weights_handed_out_has_the_engines_loss(name: str, folder: Path) -> None:
    model = ranks.stock(name)
    state = store.find(folder / name)
    assert state is not None
    gate.set_biases(model, state["biases"])
    missing, unexpected = model.load_state_dict(load_file(folder / f"{name}-saved.safetensors"), strict=False)
    assert (missing, unexpected) == (["lm_head.weight"], [])  # tied
    balancer = Balancer(ranks.settings(name), model)
    with torch.no_grad():
        losses = [ranks.loss(model, ids_L[None], balancer).item() for ids_L in ranks.windows(ranks.SAVED + 1)]
    after = json.loads((folder / f"{name}.json").read_text())["after"]
    assert sum(losses) / len(losses) == pytest.approx(after[0][0], rel=1e-6)


@pytest.mark.e2e
@pytest.mark.parametrize("name", EXACT)
@pytest.mark.usefixtures("process_group")
def test_one_process_resumes_the_checkpoint_of_two(name: str, folder: Path) -> None:
    params = ranks.settings(name, processes=1, expert_parallel=1)
    block = {"enabled": True, "autoep_size": 1, "preset_model": "mixtral"}
    built = ranks.build(name, params, world_size=1, **block)
    checkpoints = CheckpointManager(folder / name, params=params, rank=0, world_size=1)
    state = checkpoints.latest()
    assert state is not None
    checkpoints.restore(built, state)
    gate.set_biases(built.module, state["biases"])
    weights = built.full_weights()
    assert weights is not None
    for key, tensor in load_file(folder / f"{name}-saved.safetensors").items():
        assert torch.equal(tensor, weights[key]), key
    seen = torch.tensor(ranks.train(built, params, range(ranks.SAVED + 1, ranks.LAST + 1)))
    expected = torch.tensor(json.loads((folder / f"{name}.json").read_text())["after"])
    torch.testing.assert_close(seen, expected, rtol=2e-6, atol=0)
    last = load_file(folder / f"{name}-last.safetensors")
    torch.testing.assert_close(built.full_weights(), last, rtol=1e-5, atol=1e-6)
    built.deepspeed.destroy()


@pytest.mark.e2e
@pytest.mark.parametrize("name", list(ranks.CASES))
def test_a_checkpoint_gives_the_weights_that_the_engine_handed_out(name: str, folder: Path, tmp_path: Path) -> None:
    ranks.stock(name).config.save_pretrained(tmp_path)
    path = tmp_path / "checkpoint"
    shutil.copytree(folder / name / f"step-{ranks.SAVED:08}", path)
    result = masters.read(path, params=ranks.settings(name), model=tmp_path)
    expected = load_file(folder / f"{name}-saved.safetensors")
    torch.testing.assert_close(result, expected, rtol=0, atol=0)


SMALL = {
    "vocab_size": 64, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1,
    "num_experts_per_tok": 2, "tie_word_embeddings": False, "initializer_range": 0.2,
}  # fmt: skip
KINDS: dict[str, dict[str, Any]] = {
    "mixtral": {"intermediate_size": 8, "num_local_experts": 4},
    "granitemoe": {"intermediate_size": 8, "num_local_experts": 4},
    "granitemoeshared": {"intermediate_size": 8, "num_local_experts": 4, "shared_intermediate_size": 12},
    "qwen2_moe": {
        "intermediate_size": 24, "moe_intermediate_size": 8, "shared_expert_intermediate_size": 12, "num_experts": 4,
        "norm_topk_prob": True, "mlp_only_layers": [0],
    },
    "qwen3_moe": {
        "intermediate_size": 24, "moe_intermediate_size": 8, "num_experts": 4, "norm_topk_prob": False, "head_dim": 8,
    },
}  # fmt: skip


def small(kind: str, **fields: Any) -> Any:
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **SMALL, **KINDS[kind] | fields)).train()


@pytest.mark.parametrize("kind", list(KINDS))
@pytest.mark.usefixtures("process_group")
def test_every_class_computes_the_same_and_comes_back_under_its_own_names(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, spread = small(kind), ranks.settings("zero-1")
    asked = {"input_ids": ranks.windows(0), "use_cache": False, "output_hidden_states": True}
    expected, before = model(**asked), {key: parameter.clone() for key, parameter in model.named_parameters()}
    block = expert_parallel.configuration(spread, model_type=kind)["expert_parallel"] | {"autoep_size": 1}
    params = ranks.settings("zero-1", processes=1, expert_parallel=1)
    config = configuration.of(params, dtype=torch.float32) | {"expert_parallel": block}
    built = interface.build(model, params, config=config)
    assert expert_parallel.prepare(built.deepspeed, biases=[]) == (1 if kind == "qwen2_moe" else 2)
    assert expert_parallel._blocks(built.deepspeed)
    out = built(**asked)
    torch.testing.assert_close(out.logits, expected.logits, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(out.hidden_states, expected.hidden_states, rtol=1e-5, atol=1e-5)
    weights = built.full_weights()
    assert weights is not None
    assert weights.keys() == before.keys()
    for key, tensor in weights.items():
        assert torch.equal(tensor, before[key]), key

    stock = families.expected(model.config)
    monkeypatch.setattr(families, "expected", lambda _: stock | {"model.layers.1.mlp.extra": (4,)})
    with pytest.raises(TrainingError, match=r"1 missing \(model\.layers\.1\.mlp\.extra\)"):
        built.full_weights()
    built.deepspeed.destroy()


@pytest.mark.parametrize(
    ("kind", "fields", "reason"),
    [
        ("llama", {}, "model_type = 'llama' is none of mixtral, "),
        ("mixtral", {"noise": True}, "noise: true needs a router of ours"),
        ("mixtral", {"train": "router"}, "train: router leaves the experts as they are"),
    ],
)
def test_settings_that_deepspeed_cannot_follow_are_refused_with_the_reason(
    kind: str, fields: dict[str, Any], reason: str
) -> None:
    with pytest.raises(TrainingError, match=r"pretrain\.expert_parallel = 2: .*With expert_parallel: 1") as error:
        expert_parallel.configuration(ranks.settings("zero-1", **fields), model_type=kind)
    assert reason in str(error.value)


def test_models_that_deepspeeds_router_would_change_are_refused_with_the_reason() -> None:
    params = ranks.settings("zero-1")
    expert_parallel.check(small("mixtral"), params)
    with pytest.raises(TrainingError, match="it doesn't divide the model's 5 experts a layer"):
        expert_parallel.check(small("mixtral", num_local_experts=5), params)
    with pytest.raises(
        TrainingError, match=r"router_jitter_noise = 0\.1, which DeepSpeed's router lacks; set it to 0"
    ):
        expert_parallel.check(small("mixtral", router_jitter_noise=0.1), params)
    for change in (gate.add_noise, lambda model: gate.swap_in(model, {1: gate.start(4, 16, seed=0, layer=1)})):
        model = small("mixtral")
        change(model)
        with pytest.raises(
            TrainingError, match=r"model\.layers\.\d\.mlp\.gate is not linear as DeepSpeed's router is"
        ):
            expert_parallel.check(model, params)
        expert_parallel.check(model, ranks.settings("zero-1", expert_parallel=1))
