"""Figures of a step, held to PyTorch's own FLOP counter, to closed forms and to what the system says."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoConfig, AutoModelForCausalLM

from tasks import architectures
from tasks.pretrain import trainable
from tasks.pretrain.log import meters
from tasks.settings.pretrain import What
from tests import models, warm_processes

CPU = torch.device("cpu")
TOKENS = 48
SIZES = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 6,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "vocab_size": 128,
    "attn_implementation": "eager",
}
PLACES = {"mlp_only_layers": [0, 2]}
CASES = [
    (kind, what)
    for kind in architectures.ALL
    for what in (("all",) if kind in architectures.DENSE else ("all", "experts", "router"))
]


@pytest.mark.parametrize(("kind", "what"), CASES)
def test_flops_of_a_training_step_agree_with_pytorchs_counter_within_2_percent(kind: str, what: What) -> None:
    torch.manual_seed(0)
    own = models.own_fields(kind, places=PLACES)
    config = AutoConfig.for_model(kind, **SIZES, **own, experts_implementation="eager")
    model = AutoModelForCausalLM.from_config(config)
    trainable.require(model, trainable.TRAINED[what])
    ids = torch.randint(config.vocab_size, (2, TOKENS // 2))
    with FlopCounterMode(display=False) as counter:
        model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
    counted = meters.flops(config, seq_len=TOKENS // 2, what=what) * TOKENS
    assert counted == pytest.approx(counter.get_total_flops(), rel=0.02)


def test_a_dense_model_has_no_router_to_train_alone() -> None:
    with pytest.raises(ValueError, match=r"model_type = 'llama' has no router to train alone"):
        meters.flops(AutoConfig.for_model("llama", **SIZES), seq_len=8, what="router")


LOADS = st.tuples(st.integers(1, 4), st.integers(1, 9)).flatmap(
    lambda shape: arrays.arrays(np.int64, shape, elements=st.integers(0, 10**9))
)


@given(LOADS)
@settings(max_examples=60, deadline=None)
def test_the_load_of_the_experts_is_what_its_definitions_say(load_LE: np.ndarray) -> None:
    result = meters.expert_load(load_LE, detailed=True)
    for layer, load_E in enumerate(load_LE.tolist()):
        shares = [load / max(sum(load_E), 1) for load in load_E]
        entropy = -sum(share * math.log(share) for share in shares if share) / math.log(max(len(load_E), 2))
        assert result["layers"]["entropy"][layer] == pytest.approx(entropy, abs=1e-4)
        assert result["layers"]["peak"][layer] == pytest.approx(max(shares), abs=1e-4)
        assert result["layers"]["used"][layer] == pytest.approx(
            sum(load > 0 for load in load_E) / len(load_E), abs=1e-4
        )
    for name in ("used", "entropy", "peak"):
        assert result[name] == pytest.approx(np.mean(result["layers"][name]), abs=1e-4)
    assert result["dead"] == int((load_LE == 0).sum())
    assert result["tokens"] == load_LE.tolist()


def test_an_even_load_has_entropy_1_and_a_single_expert_0() -> None:
    result = meters.expert_load(np.array([[5, 5, 5, 5], [20, 0, 0, 0]]), detailed=False)
    assert result["layers"] == {"used": [1.0, 0.25], "entropy": [1.0, 0.0], "peak": [0.25, 1.0]}
    assert (result["entropy"], result["dead"]) == (0.5, 3)
    assert "tokens" not in result


def test_a_dense_model_has_no_load() -> None:
    assert meters.expert_load(np.zeros((0, 0), dtype=np.int64), detailed=True) == {}


def hold_memory() -> None:
    before = meters.memory(CPU)
    block = np.ones(1 << 25)
    during = meters.memory(CPU)
    del block
    print(*(memory[name] for memory in (before, during, meters.memory(CPU)) for name in ("rss", "rss_peak")))


def test_memory_is_what_this_process_has_and_its_peak_outlives_it() -> None:
    before, _, during, during_peak, after, after_peak = map(int, warm_processes.run(hold_memory).stdout.split())
    block = 8 << 25
    assert during - before == pytest.approx(block, rel=0.05)
    assert during - after == pytest.approx(block, rel=0.05)
    assert min(during_peak, after_peak) >= during - (1 << 20)  # Linux counts pages in batches, per thread


def test_timing_adds_up_and_mfu_is_flops_over_the_peak() -> None:
    spent = {"data": 0.1, "forward": 0.5, "backward": 1.0, "optimizer": 0.2}
    result = meters.timing(2.0, spent, tokens=1000, flops_per_token=3_000_000, peak=6e9, device=CPU)
    assert result["other"] == pytest.approx(0.2)
    assert result["tokens_per_second"] == 500
    assert result["flops_per_second"] == 1.5e9
    assert result["mfu"] == 0.25
    assert result["memory"]["rss"] > 0
    assert "extra_flops_per_second" not in result


def test_the_passes_of_a_teacher_are_told_beside_mfu_and_are_not_in_it() -> None:
    given = {"tokens": 1000, "flops_per_token": 3_000_000, "peak": 6e9, "device": CPU}
    result = meters.timing(2.0, {}, **given, extra_flops_per_token=1_000_000)
    assert (result["mfu"], result["extra_flops_per_second"]) == (0.25, 5e8)


def test_the_peak_of_a_processor_is_the_speed_of_its_best_matrix_product(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    clock = iter([0.0, 2.0, 10.0, 11.0, 20.0, 24.0])
    monkeypatch.setattr(meters.time, "perf_counter", lambda: next(clock))
    threads = torch.get_num_threads()
    assert meters.peak(CPU, torch.float32, size=64, rounds=3) == 2 * 64**3 / 1.0 * threads
    assert torch.get_num_threads() == threads


def test_the_peak_of_a_processor_counts_the_threads_that_a_process_may_use(monkeypatch: pytest.MonkeyPatch) -> None:
    used = []
    monkeypatch.setattr(torch, "get_num_threads", lambda: 7)
    monkeypatch.setattr(torch, "set_num_threads", used.append)
    monkeypatch.setattr(meters.time, "perf_counter", iter([0.0, 1.0]).__next__)
    assert meters.peak(CPU, torch.float32, size=64, rounds=1) == 2 * 64**3 * 7
    assert used == [1, 7]


def test_short_products_are_repeated_until_one_of_them_had_the_processor_for_itself(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    seconds = [0.03, 0.03, 0.03, 0.03, 0.03, 0.05, 0.001]  # the sixth reaches the 0.2 s
    clock = iter([at for second in seconds for at in (0.0, second)])
    monkeypatch.setattr(meters.time, "perf_counter", lambda: next(clock))
    assert meters.peak(CPU, torch.float32, size=64) == 2 * 64**3 / 0.03 * torch.get_num_threads()
    monkeypatch.setattr(meters, "SECONDS", 0.2005)
    clock = iter([at for second in seconds for at in (0.0, second)])
    assert meters.peak(CPU, torch.float32, size=64) == 2 * 64**3 / 0.001 * torch.get_num_threads()


@pytest.mark.parametrize(
    ("name", "peak"),
    [
        ("NVIDIA H100 80GB HBM3", 989.4e12),
        ("NVIDIA H100 PCIe", 756.5e12),
        ("NVIDIA GH200 480GB", 989.4e12),
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("NVIDIA A10", 125e12),
        ("NVIDIA L40S", 362e12),
    ],
)
def test_a_known_card_has_the_peak_of_its_data_sheet(name: str, peak: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _device: name)
    assert meters.peak(torch.device("cuda"), torch.bfloat16) == peak


def test_ranks_far_slower_than_the_median_are_named_with_their_machine() -> None:
    hosts = ["a", "a", "b", "b"]
    assert meters.stragglers([1.0, 1.1, 1.0, 1.7], hosts) == [
        "rank 3 on b took 1.70 s, 1.7 times the median of 1.00 s"
    ]
    assert meters.stragglers([1.0, 1.5, 1.2, 1.0], hosts) == []
    assert meters.stragglers([3.0, 1.0], ["a", "b"]) == ["rank 0 on a took 3.00 s, 3.0 times the median of 1.00 s"]
    assert meters.stragglers([2.0], ["a"]) == []
    assert meters.stragglers([0.0, 0.0], ["a", "b"]) == []
