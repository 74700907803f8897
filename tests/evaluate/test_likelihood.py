"""Loss per domain: the figures against independent loops."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tasks import settings
from tasks.corpus.tokenizer import encoder
from tasks.evaluate import likelihood, routing_balance
from tasks.moe import checkpoint

TEXT = "The quick brown fox jumps over the lazy dog; naïve café prices rose by 5 % — again. " * 40


@pytest.fixture(scope="module")
def windows(tiny_model: Path) -> dict[str, np.ndarray]:
    from transformers import AutoTokenizer

    ids = AutoTokenizer.from_pretrained(tiny_model)(TEXT)["input_ids"]
    return {"fox": np.array(ids[: 5 * 32]).reshape(5, 32), "shifted": np.array(ids[7 : 7 + 3 * 32]).reshape(3, 32)}


def test_perplexity_is_the_exponential_of_the_mean_loss_that_transformers_computes(
    tiny_model: Path, windows: dict[str, np.ndarray]
) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    measured = likelihood.measure(checkpoint.load(tiny_model, dtype=torch.float32), windows, batch=2)
    scores = likelihood.scores(
        measured["nats"], likelihood.counts(windows, token_bytes=encoder.token_bytes(tiny_model))
    )
    model = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32).eval()
    for domain, ids in windows.items():
        with torch.no_grad():
            losses = [
                model(input_ids=torch.from_numpy(row[None]), labels=torch.from_numpy(row[None])).loss.item()
                for row in ids
            ]
        assert scores["perplexity"][domain] == pytest.approx(math.exp(sum(losses) / len(losses)), rel=1e-5)
    means = [scores["loss"][domain] for domain in windows]
    assert scores["loss"]["mean"] == pytest.approx(sum(means) / 2)
    assert scores["perplexity"]["mean"] == pytest.approx(math.exp(sum(means) / 2))
    assert measured["load"] == {}


def test_bits_per_byte_divide_by_the_bytes_of_the_predicted_text(
    tiny_model: Path, windows: dict[str, np.ndarray]
) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    counted = likelihood.counts(windows, token_bytes=encoder.token_bytes(tiny_model))
    for domain, ids in windows.items():
        # A window may cut a character in two, so its text is the difference of two decoded prefixes' bytes.
        pieces = [tokenizer.convert_ids_to_tokens(row[1:].tolist()) for row in ids]
        assert counted[domain] == {
            "windows": len(ids),
            "tokens": len(ids) * 31,
            "bytes": sum(len(token) for row in pieces for token in row),  # byte-level BPE: one character a byte
        }
    nats = {domain: [2.0] * len(ids) for domain, ids in windows.items()}
    scores = likelihood.scores(nats, counted)
    expected = 2.0 * 5 / math.log(2) / counted["fox"]["bytes"]
    assert scores["bits_per_byte"]["fox"] == pytest.approx(expected)


def test_the_paired_difference_is_the_mean_of_domain_means_with_their_pooled_error() -> None:
    test = {"a": {"windows": 3, "tokens": 30, "bytes": 1}, "b": {"windows": 2, "tokens": 20, "bytes": 1}}
    first = {"a": [20.0, 22.0, 27.0], "b": [30.0, 34.0]}
    second = {"a": [10.0, 10.0, 10.0], "b": [10.0, 10.0]}
    difference, swapped = (likelihood.difference(*pair, test) for pair in ((first, second), (second, first)))
    a, b = np.array([1.0, 1.2, 1.7]), np.array([2.0, 2.4])
    assert difference["loss"] == -swapped["loss"] == pytest.approx((a.mean() + b.mean()) / 2)
    error = math.sqrt(a.var(ddof=1) / 3 + b.var(ddof=1) / 2) / 2
    assert difference["stderr"] == swapped["stderr"] == pytest.approx(error)


def test_a_single_window_gives_no_standard_error() -> None:
    assert likelihood.difference({"a": [3.0]}, {"a": [1.0]}, {"a": {"windows": 1, "tokens": 2}}) == {"loss": 1.0}


def test_a_domain_cannot_take_the_name_of_the_mean() -> None:
    domain = {"source": "dir:x", "format": "text", "license": "MIT"}
    raw = {"models": {"m": {"source": "dir:m", "license": "MIT"}}, "pipelines": {}}
    with pytest.raises(settings.SettingsError, match=r"corpora\.c: domains\.mean"):
        settings.validate(raw | {"corpora": {"c": {"model": "m", "domains": {"mean": domain}}}})


def test_balance_of_an_even_load_is_one_and_counts_idle_experts() -> None:
    even = routing_balance.balance({"a": [[5, 5], [5, 5]], "b": [[1, 1], [1, 1]]}, layers=[0, 1], top_k=1)
    assert (even["peak"], even["unused"], even["collapsed"]) == (1.0, 0.0, 0)
    balance = routing_balance.balance({"a": [[4, 0, 0, 0], [1, 1, 1, 1]]}, layers=[1, 3], top_k=1)
    assert (balance["peak"], balance["unused"]) == (pytest.approx((4 + 1) / 2), pytest.approx(3 / 8))


def test_the_worst_layer_is_the_one_whose_busiest_experts_take_most() -> None:
    one, other = {"a": [[3, 3, 3, 3], [6, 4, 1, 1]]}, {"b": [[3, 3, 3, 3], [4, 6, 1, 1]]}
    balance = routing_balance.balance(one | other, layers=[1, 3], top_k=2)
    assert balance["worst"] == {"layer": 3, "busiest": round(20 / 24, 4), "max_share": round(10 / 12, 4), "unused": 0}
    assert balance["layers"]["busiest"] == [0.5, round(20 / 24, 4)]
    assert (balance["even"], balance["limit"], balance["collapsed"]) == (0.5, 0.75, 1)


@given(st.integers(1, 8), st.data())
def test_always_the_same_experts_is_a_load_of_one_and_all_experts_never_a_collapse(
    experts: int, data: st.DataObject
) -> None:
    top_k = data.draw(st.integers(1, experts))
    chosen = [7 if i < top_k else 0 for i in range(experts)]
    balance = routing_balance.balance({"a": [chosen]}, layers=[0], top_k=top_k)
    assert balance["worst"]["busiest"] == 1
    assert balance["collapsed"] == (top_k < experts)


def test_a_model_without_sparse_layers_has_no_balance() -> None:
    assert routing_balance.balance({}, layers=[], top_k=0) == {}
