"""What engine.py and moe_kernels/autoep.py rely on inside DeepSpeed's AutoEP and in transformers.

A failing test here means that a new release has changed an internal. Its docstring says which file to change.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import inspect
from pathlib import Path
from typing import Any

import pytest
import torch
from packaging.version import Version
from transformers.utils import output_capturing

from tasks.plugins.expert_parallel import engine as expert_parallel
from tasks.pretrain.engine import configuration, interface
from tasks.pretrain.job import TrainingError
from tests.pretrain import engines

BLOCK = {"enabled": True, "autoep_size": 1, "preset_model": "mixtral"}


pytestmark = pytest.mark.usefixtures("process_group")


def convert() -> Any:
    params = engines.settings()
    config = configuration.of(params, dtype=torch.float32) | {"expert_parallel": BLOCK}
    return interface.build(engines.mixtral(), params, config=config).deepspeed


def test_router_logits_of_a_stock_model_are_recorded_after_a_conversion_too() -> None:
    """AutoEP must leave transformers' registry as it found it."""
    convert().destroy()
    logits = engines.mixtral(output_router_logits=True)(input_ids=torch.arange(5)[None]).router_logits
    assert [tuple(each.shape) for each in logits] == [(5, 4)] * 2
    assert all(isinstance(key, str) and key.startswith("<class ") for key in output_capturing._CAN_RECORD_REGISTRY)
    assert str(str) not in output_capturing._CAN_RECORD_REGISTRY


def test_class_names_are_keys_within_the_block_and_no_longer_after_it() -> None:
    registry = output_capturing._CAN_RECORD_REGISTRY
    methods = type(registry).get, type(registry).__setitem__
    made = engines.mixtral()
    with expert_parallel.keyed_by_class_name():
        assert registry.get(str(type(made)), None)["router_logits"]
        assert registry.get("no class", 7) == 7
        registry["a class"] = {}
        assert registry.pop("a class") == {}
    assert (type(registry).get, type(registry).__setitem__) == methods


@pytest.mark.skipif(
    Version(importlib.metadata.version("transformers")) < Version("5.23"), reason="the registry's keys are names"
)
def test_autoep_still_needs_class_names_as_keys(monkeypatch: pytest.MonkeyPatch) -> None:
    """When this fails, DeepSpeed has followed transformers 5.23: raise its lower bound, delete keyed_by_class_name.

    Until then the error of an AutoEP that meets a transformers it doesn't know names both versions.
    """
    monkeypatch.setattr(expert_parallel, "keyed_by_class_name", contextlib.nullcontext)
    with pytest.raises(TrainingError, match=r"AutoEP of DeepSpeed 0\..* transformers 5\..*_CanRecordRegistry\.get"):
        convert()


def test_a_converted_block_has_the_parts_that_are_read_of_it() -> None:
    """engine.py (_blocks, _gather, _biased, _read) and moe_kernels/autoep.py."""
    engine = convert()
    (name, block), *_ = expert_parallel._blocks(engine).items()
    assert name == "model.layers.0.mlp"
    assert (block.ep_size, block.num_experts) == (1, 4)
    assert torch.distributed.get_world_size(block.ep_group) == 1
    router = block.router
    assert (type(router).__name__, router.top_k, router.num_experts, router.route_norm) == (
        "TokenChoiceTopKRouter", 2, 4, True,
    )  # fmt: skip
    assert list(inspect.signature(type(router).forward).parameters) == ["self", "x", "expert_bias"]
    weights_TK, chosen_TK, counts_E = router(torch.randn(5, 16))
    assert (weights_TK.shape, chosen_TK.shape) == ((5, 2), (5, 2))
    assert counts_E.tolist() == torch.bincount(chosen_TK.flatten(), minlength=4).tolist()
    experts = block.experts
    assert {key: tuple(tensor.shape) for key, tensor in experts.named_parameters()} == {
        "w1": (4, 8, 16), "w2": (4, 16, 8), "w3": (4, 8, 16),
    }  # fmt: skip
    assert experts.activation == "swiglu"
    assert list(inspect.signature(type(experts).forward).parameters) == ["self", "x", "num_tokens_per_expert"]
    engine.destroy()


def test_the_placement_of_experts_gives_each_ranks_in_the_order_of_its_tensors() -> None:
    """engine.py (_gather)."""
    from deepspeed.checkpoint import autoep_affine

    placement = autoep_affine.legacy_uniform_autoep_placement_descriptor(4, 2, 2)
    assert [list(autoep_affine.autoep_experts_for_rank(placement, rank)) for rank in range(2)] == [[0, 1], [2, 3]]


def test_tested_versions_are_those_that_the_project_allows() -> None:
    """expert_parallel.TESTED, which the refusal quotes, against pyproject.toml."""
    stated = (Path(__file__).parents[3] / "pyproject.toml").read_text()
    assert all(f'"{each}"' in stated for each in expert_parallel.TESTED), expert_parallel.TESTED
