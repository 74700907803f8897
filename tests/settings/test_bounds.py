"""No field takes a number that no stage can work with; what does not fit together is found before anything runs."""

from __future__ import annotations

import copy
import functools
import importlib
import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import settings as settings_of_hypothesis
from hypothesis import strategies as st

from tasks import settings
from tasks.settings.deployments import FLOWS, Deployment, Schedule
from tests.settings.test_settings import TRAINED, changed, fault

FULL = changed("pipelines.fine.pretrain.distill", {"logits": 1.0, "temperature": 2.0})
FULL["corpora"]["demo"]["filters"] = [{"rule": rule} for rule in ("length", "gopher_quality", "gopher_repetition",
    "c4_quality", "fineweb_quality", "fluency", "advertisement")]  # fmt: skip
FULL["pipelines"]["fine"]["mixture"] |= {"weights": dict.fromkeys(TRAINED, 1.0)}
FULL["pipelines"]["fine"]["pretrain"]["dynamic"]["references"] = {
    "losses": {domain: [3.0, 2.5, 2.2] for domain in TRAINED},
    "sizes": [1000, 10_000, 100_000],
}
FULL["pipelines"]["fine"]["pretrain"]["train"] = [{"what": "router", "tokens": 4096}, {"what": "all"}]
FULL["pipelines"]["demo"]["mixture"] = {"method": "olmix", "swarm": {"units": 16}, "proxy": {
    "model": "student", "layers": 4, "tokens": 65536, "learning_rate": 2e-4, "micro_batch": 4}}  # fmt: skip
FULL["deployments"][1]["parameters"] |= {"tolerance": 0.1}
FULL = settings.validate(FULL).model_dump()  # every field, those with a default too
PREFECTS = {"build", "push", "pull", "triggers", "sla", "interval", "anchor_date", "work_pool", "concurrency_limit"}
"""Keys of a deployment that only Prefect reads."""


def leaves(node: Any, *path: Any) -> Iterator[tuple[Any, ...]]:
    """Paths to all values that are no sections."""
    items = node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else None
    if not items:
        yield path
    for key, value in items or ():
        yield from leaves(value, *path, key)


NUMBERS = st.one_of(
    st.sampled_from([math.inf, -math.inf, math.nan, -1, 0, 1, -1.0, 0.0, 10**30, -(10**30), 1e300, 5e-324, 2**63]),
    st.integers(),
    st.floats(),
)


@settings_of_hypothesis(max_examples=150, deadline=None)
@given(st.sampled_from([path for path in leaves(FULL) if not PREFECTS & set(path)]), NUMBERS)
@example(("models", "smollm2-135m-q4", "shape", "num_hidden_layers"), 61_338_116_936)
def test_a_number_in_any_field_is_refused_by_name_or_is_one_to_work_with(path: tuple[Any, ...], value: float) -> None:
    """No field takes what is not finite, and what is taken survives JSON and float32."""
    raw = copy.deepcopy(FULL)
    node = raw
    for key in path[:-1]:
        node = node[key]
    node[path[-1]] = value
    try:
        result = settings.validate(raw).model_dump()
    except settings.SettingsError as error:
        told = str(error)
        named = [part for part in path if isinstance(part, str)]
        assert any(part in told for part in named[-2:]), told
        return
    numbers = [leaf for leaf in map(functools.partial(at, result), leaves(result)) if isinstance(leaf, int | float)]
    assert json.dumps(numbers, allow_nan=False)
    assert all(abs(number) <= (2**53 if isinstance(number, int) else 1e30) for number in numbers)


def at(node: Any, path: tuple[Any, ...]) -> Any:
    for key in path:
        node = node[key]
    return node


@pytest.mark.parametrize(
    ("config", "limit"),
    [
        ({"max_position_embeddings": 4096}, 4096),
        ({"max_position_embeddings": 4096, "rope_scaling": {"type": "linear", "factor": 4.0}}, 16384),
        ({"max_position_embeddings": 32768, "rope_parameters": {"rope_type": "yarn", "factor": 4.0,
          "original_max_position_embeddings": 32768}}, 131072),
        ({"max_position_embeddings": 131072, "rope_scaling": {"rope_type": "llama3", "factor": 8.0,
          "original_max_position_embeddings": 8192}}, 131072),
    ],
)  # fmt: skip
def test_a_window_longer_than_the_models_positions_is_refused_once_its_config_is_known(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, config: dict[str, Any], limit: int
) -> None:
    """By the folder that it comes from, before anything runs; by what was fetched, unless of another source."""
    monkeypatch.chdir(tmp_path)
    raw = changed("models.smollm2-135m-q4.shape", None)
    raw["pipelines"]["fine"]["evaluate"]["seq_len"] = limit + 1
    settings.validate(raw)
    fetched = tmp_path / "data/models/smollm2-135m-q4"
    for folder in (tmp_path / "parent", fetched):
        folder.mkdir(parents=True)
        (folder / "config.json").write_text(json.dumps(config))
    assert f"evaluate.seq_len = {limit + 1}: smollm2-135m-q4 has max_position_embeddings = {limit} (data/" in fault(
        raw
    )
    raw["pipelines"]["fine"]["evaluate"]["seq_len"] = limit
    settings.validate(raw)
    raw["pipelines"]["fine"]["evaluate"]["seq_len"] = limit + 1
    fetched.with_suffix(".json").write_text('{"source": "dir:elsewhere"}')
    settings.validate(raw)
    raw["models"]["smollm2-135m-q4"] |= {"source": "dir:parent", "sha256": None}
    assert f"= {limit} (parent/config.json)" in fault(raw)


def test_deployments_have_the_keys_and_the_flows_the_parameters_that_prefect_reads() -> None:
    from prefect.cli.deploy._models import DeploymentConfig, RawScheduleConfig

    assert set(Deployment.model_fields) == set(DeploymentConfig.model_fields)
    assert set(Schedule.model_fields) == set(RawScheduleConfig.model_fields)
    for name, parameters in FLOWS.items():
        flow = getattr(importlib.import_module(f"flows.{name}"), name)
        assert list(parameters.model_fields) == list(flow.parameters.properties)
