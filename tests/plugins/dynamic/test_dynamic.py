from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tasks.plugins.dynamic import hooks as dynamic
from tasks.plugins.dynamic.hooks import Reweighter
from tasks.pretrain.job import Job, TrainingError
from tasks.pretrain.validation import Validation
from tasks.settings import Pretrain

# Sheared-LLaMA's notebook: losses of LLaMA 2 7B, 13B and 70B, and what it prints for the 370M model.
SIZES = [6738415616, 13015864320, 68976648192]
PRINTED = {
    "cc": ([1.7520, 1.6680, 1.4621], 2.1401),
    "github": ([0.6216, 0.5791, 0.4890], 0.8694),
    "book": ([1.9063, 1.8242, 1.6450], 2.3625),
    "stackex": ([1.4482, 1.3936, 1.2805], 1.7791),
    "wiki": ([1.4844, 1.3945, 1.2118], 2.0470),
    "arxiv": ([1.2637, 1.2109, 1.1148], 1.6637),
    "c4": ([1.9219, 1.8486, 1.6848], 2.3139),
}


def job(references: Any, *, folder: Path = Path(), rule: str = "paper") -> Job:
    params = Pretrain(
        tokens=1024,
        seq_len=64,
        batch=2,
        learning_rate=1e-3,
        dynamic={"rule": rule, "references": references},  # type: ignore[arg-type]
    )
    paths = dict.fromkeys(("corpus", "model", "parent", "mixture", "workspace"), folder)
    return Job(pipeline="p", params=params, **paths)


def validation(*domains: str, references: dict[str, float] | None = None) -> Validation:
    return Validation(windows={domain: np.zeros((1, 64), dtype=np.int64) for domain in domains}, references=references)


def load(of: Job, on: Validation) -> Reweighter | None:
    return Reweighter.load(of, validation=on, start=dict.fromkeys(on.windows, 1 / len(on.windows)))


@pytest.mark.parametrize("domain", PRINTED)
def test_the_fit_predicts_what_the_published_notebook_prints(domain: str) -> None:
    losses, printed = PRINTED[domain]
    result = dynamic.predict(losses, sizes=SIZES, size=373867520, domain=domain)
    assert round(result, 4) == printed


def test_the_fit_recovers_the_law_that_made_the_losses_from_more_sizes_than_it_has_parameters() -> None:
    sizes = [10**7, 10**8, 10**9, 10**10]
    losses = [120.0 / n**0.3 + 1.5 for n in sizes]
    assert dynamic.predict(losses, sizes=sizes, size=10**6, domain="d") == pytest.approx(120 / 10**1.8 + 1.5, rel=1e-5)


def test_a_fit_that_predicts_no_loss_is_an_error_that_names_the_domain_and_the_figures() -> None:
    with pytest.raises(
        TrainingError, match=r"the fit of code's losses \[1.0, 2.0, 3.0\] at .* predicts -4541 for 1000000"
    ):
        dynamic.predict([1.0, 2.0, 3.0], sizes=SIZES, size=10**6, domain="code")


def test_a_fit_that_does_not_converge_is_an_error_that_names_the_domain(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dynamic, "_EVALUATIONS", 5)
    with pytest.raises(
        TrainingError, match=r"the fit of code's losses .* doesn't converge; give references by domain"
    ):
        dynamic.predict([3.0, 2.0, 1.0], sizes=SIZES, size=10**9, domain="code")


def test_references_come_from_the_parent_from_the_settings_or_from_the_fit_in_the_corpus_order() -> None:
    parent = load(job("parent"), validation("wiki", "cc", references={"cc": 2.0, "wiki": 1.0}))
    given = load(job({"cc": 2.5, "wiki": 1.5}), validation("wiki", "cc"))
    fit = {"losses": {d: PRINTED[d][0] for d in ("cc", "wiki")}, "sizes": SIZES, "size": 373867520}
    fitted = load(job(fit, rule="code"), validation("wiki", "cc"))
    assert parent
    assert given
    assert fitted
    assert list(parent.references.items()) == [("wiki", 1.0), ("cc", 2.0)]
    assert list(given.references.items()) == [("wiki", 1.5), ("cc", 2.5)]
    assert {d: round(x, 4) for d, x in fitted.references.items()} == {"wiki": 2.0470, "cc": 2.1401}
    assert fitted.rule == "code"
    without = Job(**{**vars(job("parent")), "params": job("parent").params.model_copy(update={"dynamic": None})})
    assert load(without, validation("wiki")) is None


def test_without_a_size_the_fit_predicts_for_the_split_models_active_parameters(tmp_path: Path) -> None:
    from transformers import MixtralConfig, MixtralForCausalLM

    config = MixtralConfig(
        vocab_size=64, hidden_size=16, intermediate_size=8, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=2, num_local_experts=4, num_experts_per_tok=1,
    )  # fmt: skip
    config.save_pretrained(tmp_path)
    active = sum(
        p.numel() // (4 if ".experts." in name else 1) for name, p in MixtralForCausalLM(config).named_parameters()
    )
    fit = {"losses": {"cc": [3.0, 2.0, 1.5]}, "sizes": [1000, 10000, 100000]}
    result = load(job(fit, folder=tmp_path), validation("cc"))
    assert result
    assert result.references == {
        "cc": dynamic.predict([3.0, 2.0, 1.5], sizes=[1000, 10000, 100000], size=active, domain="cc")
    }


def test_references_for_other_domains_than_the_corpus_has_are_refused_by_name() -> None:
    with pytest.raises(
        TrainingError, match=r"references: nothing for wiki; books not in the corpus; .* exactly cc, wiki"
    ):
        load(job({"cc": 1.0, "books": 1.0}), validation("cc", "wiki"))
    fit = {"losses": {"cc": [3.0, 2.0, 1.5]}, "sizes": [1, 2, 3], "size": 4}
    with pytest.raises(TrainingError, match=r"references.losses: nothing for wiki; it needs"):
        load(job(fit), validation("cc", "wiki"))


def test_given_weights_are_followed_whatever_the_losses_are(tmp_path: Path) -> None:
    recorded = {"0": {"cc": 0.3, "wiki": 0.7}, "4": {"cc": 0.1 + 0.2, "wiki": 0.7}}
    following = dataclasses.replace(job({"cc": 2.5, "wiki": 1.5}), options={"weights": recorded})
    reweighter = load(following, validation("cc", "wiki"))
    assert reweighter
    for step, weights in recorded.items():
        given = reweighter.update({"cc": 0.5, "wiki": 0.5}, losses={"cc": 9.0, "wiki": 1.0}, step=int(step))
        assert given == weights
    with_path = dataclasses.replace(following, workspace=tmp_path)
    assert Job.read(with_path.write()) == with_path
    without = dataclasses.replace(with_path, options={})
    assert Job.read(without.write()) == without


def test_smoothing_holds_back_a_share_of_the_old_weights() -> None:
    given = {"references": {"cc": 1.0, "wiki": 1.0}, "start": {"cc": 0.5, "wiki": 0.5}, "within": 4.0}
    losses = {"cc": 1.0 + math.log(3), "wiki": 1.0}
    for smoothing, expected in ((0.0, 0.75), (0.6, 0.6), (0.8, 0.55)):
        reweighter = Reweighter(rule="paper", smoothing=smoothing, **given)
        assert reweighter.update(given["start"], losses=losses, step=1)["cc"] == pytest.approx(expected)


def test_evaluations_that_move_weights_suit_the_budget_unless_the_settings_say_otherwise() -> None:
    run = {"seq_len": 512, "batch": 8, "learning_rate": 1e-3}
    plain = Pretrain(tokens=1 << 26, **run)
    assert (plain.eval_tokens, plain.eval_windows) == (1 << 20, 2)
    for tokens, windows in ((1 << 16, 2), (1 << 20, 4), (1 << 26, 8)):
        moving = Pretrain(tokens=tokens, dynamic={}, **run)
        assert (moving.eval_tokens, moving.eval_windows) == (tokens // 16, windows)
        assert Pretrain(**moving.model_dump()) == moving
    given = Pretrain(tokens=1 << 20, dynamic={}, eval_tokens=1 << 18, eval_windows=3, **run)
    assert (given.eval_tokens, given.eval_windows) == (1 << 18, 3)


@pytest.mark.parametrize("rule", ["paper", "code"])
def test_domains_end_nearer_to_their_references_together_than_with_weights_that_stand_still(rule: Any) -> None:
    """Three made-up learning curves, one of which falls slowly: the spread of loss - reference at the end."""
    references = {"quick": 1.0, "medium": 1.5, "slow": 2.0}
    scale = {"quick": 20.0, "medium": 60.0, "slow": 200.0}

    def spread(*, moving: bool) -> float:
        reweighter = Reweighter(references, rule=rule, start=dict.fromkeys(references, 1 / 3), within=1e9)
        weights, served = dict.fromkeys(references, 1 / 3), dict.fromkeys(references, 0.0)
        losses: dict[str, float] = {}
        for _ in range(40):
            losses = {d: references[d] + 2.0 * math.exp(-served[d] / scale[d]) for d in references}
            if moving:
                weights = reweighter.update(weights, losses=losses, step=0)
            served = {d: served[d] + 8 * weights[d] for d in references}
        return float(np.std([losses[d] - references[d] for d in references]))

    assert spread(moving=True) < 0.7 * spread(moving=False)


def test_a_domain_whose_reference_is_out_of_reach_stops_at_its_cap_and_is_named() -> None:
    reweighter = Reweighter(
        {"noise": 1.0, "wiki": 2.0, "out": 1.0},
        rule="paper",
        start={"noise": 0.2, "wiki": 0.8, "out": 0.0},
        within=3.0,
    )
    weights, losses = dict(reweighter.start), {"noise": 4.0, "wiki": 2.5, "out": 9.0}
    assert reweighter.at_cap(weights, losses=losses) == []
    for step in range(20):
        weights = reweighter.update(weights, losses=losses, step=step)
    assert weights == pytest.approx({"noise": 0.6, "wiki": 0.4, "out": 0.0})
    (message,) = reweighter.at_cap(weights, losses=losses)
    assert message.startswith("noise has 3 times its weight at the start")
    assert "loss of 4.0000 is above the reference of 1.0000" in message
    assert reweighter.at_cap(weights, losses=losses | {"noise": 0.9}) == []
