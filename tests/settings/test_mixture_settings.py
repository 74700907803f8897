"""Which settings go with which method of weighing domains."""

from __future__ import annotations

from typing import Any

import pytest

from tasks import settings
from tests.settings.test_settings import TRAINED, changed, fault

PROXY = {"model": "student", "layers": 4, "tokens": 65536, "learning_rate": 2e-4}
OLMIX = {"method": "olmix", "proxy": PROXY, "swarm": {"units": 16}}


def pipelines(**mixture: Any) -> dict[str, Any]:
    return changed("pipelines.demo.mixture", mixture)


def test_the_target_is_a_mean_a_domain_or_weights_over_domains_unseen_ones_too() -> None:
    known = {}
    for name, target in {"mean": "mean", "one": "docs", "some": {"code": 3.0, "docs": 1.0, "books": 0.0}}.items():
        mixture = settings.validate(pipelines(**OLMIX, target=target)).pipeline("demo").mixture
        known[name] = mixture.targets(["code", "books"])
    assert known == {
        "mean": {"code": 0.5, "books": 0.5}, "one": {"docs": 1.0}, "some": {"code": 0.75, "docs": 0.25},
    }  # fmt: skip


def test_a_proxy_from_scratch_has_sizes_without_any_being_given() -> None:
    assert settings.Proxy(model="scratch", tokens=1, learning_rate=1e-3).sizes.num_hidden_layers == 4


@pytest.mark.parametrize(
    ("mixture", "message"),
    [
        ({"method": "uniform", "proxy": PROXY}, "takes no `proxy`, which is of aioli, doge, doremi, olmix, regmix"),
        ({"method": "uniform", "target": "code"}, "method `uniform` takes no `target`, which is of aioli"),
        ({"method": "doge", "proxy": PROXY, "swarm": {"units": 9}}, "takes no `swarm`, which is of olmix, regmix"),
        ({"method": "doge", "proxy": PROXY, "weights": dict.fromkeys(TRAINED, 1.0)}, "`doge` takes no `weights`"),
        ({"method": "aioli"}, "method `aioli` needs `proxy`: {model: student, tokens: N, learning_rate: X}"),
        ({"method": "regmix", "proxy": PROXY}, "method `regmix` needs `swarm`: {units: N}"),
        (OLMIX | {"swarm": {"units": 9}}, "mixture.swarm.units = 9: a law over 4 domains has 5 constants, and tak"),
        (OLMIX | {"swarm": {"unit": 9}}, "mixture.swarm.unit = 9: unknown key; allowed here: units, workers"),
        (OLMIX | {"target": "poems"}, "mixture.target = 'poems': corpora.demo has no domain poems; it has code"),
        (OLMIX | {"target": {"code": 0.0}}, "`target` must have weights of a positive sum"),
        (OLMIX | {"target": {"code": -1.0}}, "mixture.target.mapping.code = -1.0: Input should be greater than or"),
        (OLMIX | {"weights": dict.fromkeys(TRAINED, 1.0) | {"code": 0.0}}, "weights.code = 0: they are the prior of"),
        (OLMIX | {"proxy": PROXY | {"layers": 31}}, "proxy.layers = 31: smollm2-135m-q4 has 30 (models.smollm2-135m-"),
        (OLMIX | {"proxy": PROXY | {"seq_len": 9000}}, "mixture.proxy.seq_len = 9000: smollm2-135m-q4 has max"),
        (OLMIX | {"proxy": PROXY | {"micro_batch": 3}}, "batch = 8 is not a multiple of micro_batch = 3"),
        (OLMIX | {"proxy": PROXY | {"model": "scratch"}}, "layers = N keeps the first layers of a trained model"),
        (OLMIX | {"proxy": PROXY | {"shape": {}}}, "shape is of model `scratch`; `student` has sizes of its own"),
        (OLMIX | {"proxy": PROXY | {"model": "scratch", "layers": None, "shape": {"hidden_size": 100}}},
         "hidden_size = 100 is not a multiple of 2 x num_attention_heads = 8: rotary positions turn pairs"),
        (OLMIX | {"proxy": PROXY | {"model": "scratch", "layers": None, "shape": {"num_key_value_heads": 3}}},
         "num_attention_heads = 4 is not a multiple of num_key_value_heads = 3"),
    ],
)  # fmt: skip
def test_what_does_not_go_together_is_refused_by_its_field_with_a_fix(mixture: dict[str, Any], message: str) -> None:
    assert message in fault(pipelines(**mixture))


def test_a_single_domain_leaves_nothing_to_weigh() -> None:
    raw = pipelines(**OLMIX)
    for name in TRAINED[1:]:
        raw["corpora"]["demo"]["domains"][name] |= {"unseen": True}
        raw["corpora"]["demo"]["domains"][name].pop("heldout", None)
    told = (
        "mixture.method = 'olmix': corpora.demo has a single domain, code, to train on, so there is nothing to weigh"
    )
    assert told in fault(raw)
