"""The comparison with vLLM, whose place a stand-in takes that computes by transformers."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, Qwen2MoeConfig, Qwen2MoeForCausalLM

from bench import in_vllm, vllm_check

WINDOWS = [[(7 * i + shift) % 500 for i in range(40)] for shift in (1, 2, 3, 4)]
OPTIONS = {"dtype": "float32", "threads": 1, "new": 6, "decode": 4, "repeats": 2}


class StandIn:
    """vllm.LLM with the calls that are made of it; token 9 is always `wrong` more likely than transformers says."""

    wrong = 0.0

    def __init__(self, folder: str, *, hf_overrides: dict[str, Any], **_: Any) -> None:
        if "unknown" in folder:
            raise ValueError("no such class")
        self._model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **hf_overrides).eval()

    def generate(self, prompts: list[Any], sampling: dict[str, Any], *, use_tqdm: bool) -> list[Any]:
        assert not use_tqdm
        return [self._one(prompt["prompt_token_ids"], **sampling) for prompt in prompts]

    def _one(self, ids: list[int], *, max_tokens: int, prompt_logprobs: int | None = None, **sampling: Any) -> Any:
        assert prompt_logprobs is not None or sampling == {"temperature": 0, "ignore_eos": True}
        text = list(ids)
        for _ in range(max_tokens):
            rows = self._log_softmax(text)
            text.append(int(rows[-1].argmax()))
        places = [{t: SimpleNamespace(logprob=float(row[t]))} for t, row in zip(ids[1:], rows, strict=False)]
        return SimpleNamespace(prompt_logprobs=[None, *places], outputs=[SimpleNamespace(token_ids=text[len(ids) :])])

    def _log_softmax(self, ids: list[int]) -> torch.Tensor:
        with torch.no_grad():
            logits = self._model(torch.tensor([ids])).logits[0]
        logits[:, 9] += self.wrong
        return logits.log_softmax(-1)


@pytest.fixture
def vllm(monkeypatch: pytest.MonkeyPatch) -> type[StandIn]:
    module = ModuleType("vllm")
    vars(module).update(LLM=StandIn, SamplingParams=dict, __version__="0.0")
    monkeypatch.setitem(sys.modules, "vllm", module)

    def run(command: list[str], **_: Any) -> Any:
        assert command[:3] == ["/vllm/python", "-m", "bench.in_vllm"]
        return SimpleNamespace(returncode=in_vllm.main(command[3:]))

    monkeypatch.setattr(subprocess, "run", run)
    return StandIn


def test_an_engine_that_computes_what_transformers_does_agrees_in_every_figure(
    vllm: type[StandIn], tiny_project: Path, tiny_model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for folder in ("data/models/tiny", "runs/tiny/trained"):
        Path(folder).parent.mkdir(parents=True, exist_ok=True)
        Path(folder).symlink_to(tiny_model)
    Path("runs/tiny/heldout.json").write_text(json.dumps({f"domain {i}": [ids] for i, ids in enumerate(WINDOWS)}))
    options = ["--python", "/vllm/python", "--new", "6", "--decode", "4", "--repeats", "2", "--threads", "1"]
    assert vllm_check.main(["tiny", *options, "--json", "out.json"]) == 0
    printed = capsys.readouterr()
    assert "vLLM 0.0, float32, 1 threads, prompt of 40" in printed.out
    assert "runs/tiny/control/model does not exist; the dense child is left out" in printed.err
    figures = json.loads(Path("out.json").read_text())["models"]
    assert list(figures) == ["dense", "trained"]
    for name, row in figures.items():
        assert row["perplexity"]["vllm"] == pytest.approx(row["perplexity"]["transformers"], rel=1e-5)
        assert (row["tokens"], row["others"]) == (18, 0)
        assert row["speed"]["repeats"] == 2
        assert f"| {name} | {row['perplexity']['transformers']:.4f} | " in printed.out
        assert "18 of 18 | " in printed.out


def test_an_engine_that_computes_something_else_is_shown_by_how_much_and_one_that_refuses_by_its_reason(
    vllm: type[StandIn], tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(vllm, "wrong", 100.0)
    (tmp_path / "unknown").mkdir()
    served = {"tiny": vllm_check.Served(tiny_model, {}), "unknown": vllm_check.Served(tmp_path / "unknown", {})}
    answer = vllm_check.ask(served, WINDOWS, python=Path("/vllm/python"), **OPTIONS)
    found = vllm_check.compare(served["tiny"], answer["models"]["tiny"], WINDOWS)
    assert found["perplexity"]["vllm"] > 2 * found["perplexity"]["transformers"]
    assert found["others"] == found["tokens"] == 18
    assert found["margin"] > 1
    refused = answer["models"]["unknown"]
    assert refused == {"reason": "ValueError: no such class"}
    (*_, row) = vllm_check.table({"unknown": refused})
    assert row.startswith("| unknown | vLLM does not run it: ValueError: no such class |")


def test_an_elastic_model_is_served_with_each_of_its_values_of_top_k(vllm: type[StandIn], tmp_path: Path) -> None:
    config = Qwen2MoeConfig(
        vocab_size=500, hidden_size=32, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=2,
        moe_intermediate_size=8, shared_expert_intermediate_size=8, num_experts=4, num_experts_per_tok=2,
        norm_topk_prob=False, elastic_top_k=[1, 2, 4],
    )  # fmt: skip
    torch.manual_seed(0)
    Qwen2MoeForCausalLM(config).save_pretrained(tmp_path / "elastic")
    served = vllm_check.dials({"trained": tmp_path / "elastic"})
    answer = vllm_check.ask(served, WINDOWS, python=Path("/vllm/python"), **OPTIONS)
    found = {name: vllm_check.compare(served[name], answer["models"][name], WINDOWS) for name in served}
    assert list(found) == ["trained", "trained, top_k 1", "trained, top_k 4"]
    for row in found.values():
        assert row["perplexity"]["vllm"] == pytest.approx(row["perplexity"]["transformers"], rel=1e-5)
    assert len({row["perplexity"]["vllm"] for row in found.values()}) == 3


def test_an_environment_that_fails_is_named(tmp_path: Path) -> None:
    (tmp_path / "python").write_text("#!/bin/sh\necho no vllm >&2; exit 3\n")
    (tmp_path / "python").chmod(0o755)
    with pytest.raises(ValueError, match=rf"--python {tmp_path}/python: vLLM's process ended with code 3"):
        vllm_check.ask({}, WINDOWS, python=tmp_path / "python", **OPTIONS)
    with pytest.raises(OSError, match="missing"):
        vllm_check.ask({}, WINDOWS, python=tmp_path / "missing", **OPTIONS)
