"""Training with top_k drawn for each step."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, Qwen2MoeConfig

from tasks.moe import routing
from tasks.plugins.elastic import hooks as elastic
from tasks.pretrain import trainable
from tasks.pretrain.hook import Step
from tests.pretrain.engines import settings
from tests.pretrain.projects import configure
from tests.pretrain.warm_stages import killed_and_whole, stage

SIZES = {
    "vocab_size": 64, "hidden_size": 16, "intermediate_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 1, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 8,
    "shared_expert_intermediate_size": 8, "norm_topk_prob": False,
}  # fmt: skip


def model(**fields: object) -> AutoModelForCausalLM:
    made: AutoModelForCausalLM = AutoModelForCausalLM.from_config(Qwen2MoeConfig(**SIZES | fields))
    return made


def test_each_value_comes_once_in_as_many_steps_and_follows_from_seed_and_step_alone() -> None:
    values = [2, 6, 10, 14]
    drawn = [elastic.draw(values, seed=3, step=step) for step in range(1, 401)]
    assert all(sorted(drawn[i : i + 4]) == values for i in range(0, 400, 4))
    assert len({tuple(drawn[i : i + 4]) for i in range(0, 400, 4)}) > 12  # orders
    assert [elastic.draw(values, seed=3, step=step) for step in (5, 400)] == [drawn[4], drawn[399]]
    assert drawn != [elastic.draw(values, seed=4, step=step) for step in range(1, 401)]


def test_the_schedule_sets_every_router_for_a_step_and_the_usual_value_for_validation() -> None:
    values = [1, 2, 4]
    made = model(elastic_top_k=values)
    schedule = elastic.TopKSchedule(made, seed=0)
    seen = set()
    for number in range(1, 4):
        step = Step(number=number, batch=None, rate=0.1, top_k=2)  # type: ignore[arg-type]
        schedule.before_step(step)
        top_k = step.top_k
        with routing.expert_load(made) as load_LE, torch.no_grad():
            made(torch.randint(64, (1, 8)))
        assert (load_LE.sum(1) == 8 * top_k).all()
        seen.add(top_k)
    assert seen == set(values)
    schedule.after_step(step, None, sound=True)  # type: ignore[arg-type]
    assert {router.top_k for router in routing.routers(made)} == {2}


def test_the_gate_before_an_elastic_models_shared_experts_is_not_trained() -> None:
    for values in (None, [1, 2]):
        made = model(elastic_top_k=values)
        trainable.freeze(made, settings())
        frozen = [name for name, parameter in made.named_parameters() if not parameter.requires_grad]
        assert frozen == [f"model.layers.{i}.mlp.shared_expert_gate.weight" for i in range(2) if values]
        grouped = sum(len(group["params"]) for group in trainable.groups(made, settings()))
        assert grouped == len(list(made.parameters())) - len(frozen)


@pytest.mark.e2e
def test_a_killed_run_ends_with_the_same_bytes_and_the_same_draws(project: Path) -> None:
    file = project / "pipelines.yaml"
    file.write_text(file.read_text().replace("top_k: 4, ", "top_k: 4, elastic: [2, 4, 12], "))
    split = stage("tasks.partition", "tiny", cwd=project)
    assert split.returncode == 0, split.stderr
    configure(project, tokens=6 * 256)
    ended = killed_and_whole(project)
    assert ended[0] == ended[1]
    drawn = [record["top_k"] for record in ended[0][1] if record["kind"] == "step"]
    assert drawn == [elastic.draw([2, 4, 12], seed=0, step=step) for step in range(1, 7)]
    trained = AutoModelForCausalLM.from_pretrained(project / "runs/tiny/trained")
    assert (trained.config.num_experts_per_tok, trained.config.elastic_top_k) == (4, [2, 4, 12])
    assert not trained.model.layers[0].mlp.shared_expert_gate.weight.count_nonzero()
