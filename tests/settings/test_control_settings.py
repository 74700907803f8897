"""The dense child that a pipeline asks for: its sizes, and the shapes that a class cannot hold."""

from __future__ import annotations

import re
from typing import Any

import pytest

from tasks import settings
from tasks.plugins.masks.settings import changes
from tasks.settings import Control, Partition
from tasks.settings.control import Shape
from tests.settings.test_settings import changed, fault

SPLIT = Partition(method="activation", experts=12, shared_experts=4, top_k=4)
PARENT = {
    "model_type": "llama", "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 4,
    "num_attention_heads": 8, "num_key_value_heads": 4,
}  # fmt: skip


def control(method: str = "magnitude", **shape: int) -> Control:
    tokens = 1 << 20 if method == "hard_concrete" else None
    return Control.model_validate({"method": method, "tokens": tokens, "shape": shape})


def test_a_name_is_a_mapping_of_defaults_and_none_is_no_baseline() -> None:
    mapping = {"method": "hard_concrete", "tokens": 65536, "shape": {"num_hidden_layers": 20}}
    known = [
        settings.validate(changed("pipelines.fine.control", value)).pipelines["fine"].pruned
        for value in ("none", "pruned", mapping)
    ]
    assert known[:2] == [None, Control(method="static")]
    assert known[2] == Control(method="hard_concrete", tokens=65536, shape=Shape(num_hidden_layers=20))


def test_without_a_shape_the_pruned_baseline_has_as_many_neurons_as_a_token_passes() -> None:
    parent = {"intermediate_size": 128, "num_hidden_layers": 2, "hidden_size": 64}
    assert Control().config(parent, SPLIT) == parent | {"intermediate_size": 64}
    with pytest.raises(ValueError, match=r"set partition\.layers: all"):
        Control().config(parent, SPLIT.model_copy(update={"layers": [1]}))
    assert Control().config(parent, SPLIT.model_copy(update={"layers": [1, 0]}))["intermediate_size"] == 64
    wide = control(intermediate_size=96).config(parent, SPLIT.model_copy(update={"layers": [1]}))
    assert wide["intermediate_size"] == 96


def test_query_heads_go_with_the_head_of_keys_and_values_that_they_read_and_keep_their_width() -> None:
    config = control(num_key_value_heads=3, hidden_size=48, num_hidden_layers=2).config(PARENT, SPLIT)
    assert config == PARENT | {
        "num_key_value_heads": 3, "num_attention_heads": 6, "hidden_size": 48, "head_dim": 8, "num_hidden_layers": 2,
        "intermediate_size": 64,
    }  # fmt: skip
    narrow = changes(PARENT | {"layer_types": ["a", "b", "c", "d"]}, {"num_hidden_layers": 2, "intermediate_size": 64})
    assert narrow == {"num_hidden_layers": 2, "intermediate_size": 64, "layer_types": ["a", "b"]}
    qwen = control(num_key_value_heads=2, hidden_size=32).config(PARENT | {"model_type": "qwen2"}, SPLIT)
    assert (qwen["num_attention_heads"], qwen["hidden_size"], "head_dim" in qwen) == (4, 32, False)


@pytest.mark.parametrize(
    ("method", "shape", "message"),
    [
        (
            "static",
            {"hidden_size": 48},
            "shape.hidden_size = 48: .* `static` cuts FFNs alone; set method: hard",
        ),
        ("random", {"hidden_size": 65}, "shape.hidden_size = 65: the parent has 64; set it to that or less"),
        ("random", {"hidden_size": 50}, r"shape.hidden_size = 50: .* 8 heads of 8 \(2 to a head .* nearest: 48"),
        ("hard_concrete", {"intermediate_size": 2}, "masks can be led to cut 98% of them at most; raise it"),
        ("random", {"intermediate_size": 128}, "shape: it is the parent's own, so nothing is cut; lower a size"),
    ],
)
def test_a_shape_that_cannot_be_is_refused_by_its_field_with_a_fix(
    method: str, shape: dict[str, int], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        control(method, **shape).config(PARENT, SPLIT)


def test_a_class_without_a_width_of_heads_takes_hidden_size_and_heads_in_step_alone() -> None:
    for shape in ({"hidden_size": 48}, {"num_key_value_heads": 2}):
        with pytest.raises(
            ValueError, match=r"a qwen2 has no `head_dim`, so its .* need hidden_size = \d+; change both"
        ):
            control(**shape).config(PARENT | {"model_type": "qwen2"}, SPLIT)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("child", "pipelines.fine.control.name = 'child': Input should be 'pruned' or 'none'"),
        ({"method": "static", "tokens": 9}, "needs `tokens`, on which the masks are trained; no other takes it"),
        ({"method": "hard_concrete"}, "method `hard_concrete` needs `tokens`"),
        ({"shap": {}}, "control.mapping.shap: unknown key; allowed here: method, shape, parent, tokens"),
        ({"method": "hard_concrete", "tokens": 4096}, "control.tokens = 4096: masks need 20 steps .* to 20480"),
        (
            {"method": "random", "shape": {"hidden_size": 500}},
            "pipelines.fine.control.shape.hidden_size = 500: it is no multiple of the 9 heads of 64 .* nearest: 495",
        ),
    ],
)
def test_mistakes_are_told_with_the_settings(value: Any, message: str) -> None:
    assert re.search(message, fault(changed("pipelines.fine.control", value)))


def test_a_teacher_is_refused_for_a_child_of_another_depth() -> None:
    raw = changed("pipelines.fine.control", {"method": "random", "shape": {"num_hidden_layers": 20}})
    raw["pipelines"]["fine"]["pretrain"]["distill"] = {}
    assert "control.shape.num_hidden_layers = 20: the parent has 30, and pretrain.distill compares" in fault(raw)
    raw["pipelines"]["fine"]["control"]["shape"] = {"num_key_value_heads": 2}
    assert "hidden_size = 576: it is no multiple" not in str(settings.validate(raw))
