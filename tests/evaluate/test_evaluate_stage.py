"""The two stages on a real tiny corpus and real tiny checkpoints, and the check that the model card promises."""

from __future__ import annotations

import json
import math
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tasks import corpus
from tasks.corpus.sampling import windows
from tasks.evaluate import __main__ as stage
from tasks.evaluate import likelihood, summary
from tasks.evaluate.downstream import accuracy, paired
from tasks.evaluate.report import card, corpus_section, results
from tasks.moe import checkpoint
from tasks.tools.evaluate import __main__ as evaluate_checkpoints
from tests.conftest import SETTINGS
from tests.corpus import texts

ROOT = Path(corpus.__file__).parents[2]
PIPELINES = SETTINGS.replace(
    "evaluate: {{seq_len: 64, windows: 4, batch: 4}}",
    """evaluate:
      seq_len: 64
      windows: 6
      batch: 4
      tasks:
        - {{name: hellaswag_100, source: "dir:{data}/cases.jsonl", license: MIT}}
        - {{name: snli}}
        - {{name: sst2, files: {{validation: {{source: "dir:{data}/reviews.jsonl"}}}}}}
        - {{name: adv_sst2, adversarial_of: sst2, files: {{validation: {{source: "dir:{data}/reviews.tsv"}}}}}}""",
).replace(
    "\npipelines:",
    """      talk: {{source: "dir:{data}/talk.jsonl", format: jsonl, license: PSF-2.0, unseen: true}}

pipelines:""",
)
TALK = [
    f"A: How are you on day {i}?\nB: Better than on day {i - 1}, and you?\nA: {i} times as well." for i in range(60)
]
CASES = [
    {"activity_label": "A", "ctx": f"Look at {i}. it", "endings": ["is", "was", "if", "on"], "expected_index": i % 4}
    for i in range(8)
]

REVIEWS = [{"sentence": f"It was {'good' if i % 2 else 'bad'} {i} times.", "label": i % 2} for i in range(6)]


def sparse(dense: Path, folder: Path, *, seed: int) -> None:
    """A Mixtral checkpoint with the dense model's tokenizer, its balance loss switched on as after training."""
    import torch
    from transformers import MixtralConfig, MixtralForCausalLM

    torch.manual_seed(seed)
    config = MixtralConfig(
        vocab_size=512,
        hidden_size=64,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_local_experts=4,
        num_experts_per_tok=2,
        sliding_window=None,
        tie_word_embeddings=True,
        output_router_logits=True,
        router_aux_loss_coef=1.0,
    )
    MixtralForCausalLM(config).save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(dense / name, folder / name)


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path, tiny_data: Path) -> Iterator[Path]:
    """A project where everything before `evaluate` has run; the module's tests run inside it."""
    root = tmp_path_factory.mktemp("project")
    data = root / "texts"
    shutil.copytree(tiny_data, data)
    (data / "cases.jsonl").write_text("".join(json.dumps(case) + "\n" for case in CASES))
    (data / "talk.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in TALK))
    (data / "reviews.jsonl").write_text("".join(json.dumps(review) + "\n" for review in REVIEWS))
    rows = [f'"{review["sentence"]}\t{review["label"]}' for review in REVIEWS]  # a quote is text
    (data / "reviews.tsv").write_text("\n".join(["sentence\tlabel", *rows]) + "\n")
    (root / "pipelines.yaml").write_text(PIPELINES.format(model=tiny_model, data=data))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(root)
        shutil.copytree(tiny_model, root / "data" / "models" / "tiny")
        texts.run()
        for split in ("train", "validation"):
            for folder in (root / "data/corpora/tiny").glob(f"*/{split}"):
                shutil.rmtree(folder)  # nothing is judged on what it was trained on or chosen by
        sparse(tiny_model, root / "runs" / "tiny" / "moe", seed=1)
        sparse(tiny_model, root / "runs" / "tiny" / "trained", seed=2)
        yield root


@pytest.fixture(scope="module")
def judgement(project: Path) -> dict[str, Any]:
    """evaluation.json after a run that died in a task of the third model and one that went on."""
    scored: list[str] = []
    real = accuracy.score

    def counted(model: Any, tokenizer: Any, task: Any, **options: Any) -> dict[str, Any]:
        scored.append(f"{Path(model.name_or_path).name} {task.name}")
        if scored[-1] == "trained sst2" and len(scored) == 8:
            raise KeyboardInterrupt
        return real(model, tokenizer, task, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(accuracy, "score", counted)
        with pytest.raises(KeyboardInterrupt):
            stage.evaluate("tiny")
        assert not (project / "runs" / "tiny" / "evaluation.json").exists()
        (kept,) = (project / ".scratch/evaluate-tiny").glob("*/split-sst2.json")
        kept.write_text(kept.read_text().replace('"acc": ', '"acc": 1'))
        stage.evaluate("tiny")
    done = [
        f"{model} {task}" for model in ("tiny", "moe", "trained") for task in ("hellaswag_100", "sst2", "adv_sst2")
    ]
    assert scored == [*done[:8], "moe sst2", *done[7:]]  # what was changed is not believed
    return json.loads((project / "runs" / "tiny" / "evaluation.json").read_text())


def test_the_reports_corpus_section_reads_what_the_corpus_stage_writes(project: Path) -> None:
    metrics = json.loads((project / "data" / "corpora" / "tiny.json").read_text())
    lengths = results._lengths((project / "data" / "corpora" / "tiny.lengths.csv").read_text())
    assert lengths.keys() == metrics["domains"].keys()
    for name, entry in metrics["domains"].items():
        assert sum(lengths[name].values()) == sum(entry["documents"].values()) == entry["rules"]["kept"]
    assert "documents of the corpus" in corpus_section.encoder(metrics["encoder"])
    (_, read), *_, (_, kept) = corpus_section.drops(metrics["domains"])
    assert len(read) == len(kept) == 3


def test_an_interrupted_evaluation_goes_on_with_the_next_task(judgement: dict[str, Any]) -> None:
    assert {"dense", "split", "trained"} < set(judgement)


def test_a_dense_child_is_judged_beside_the_others_and_paired_with_the_trained_model_by_window(
    judgement: dict[str, Any], project: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert "child" not in judgement
    assert "trained_child" not in judgement["difference"]
    run = project / "runs" / "tiny"
    kept = {
        name: (run / name).read_text() for name in ("evaluation.json", "samples.json", "items.json", "windows.json")
    }
    for name in ("model", "parent/model"):
        shutil.copytree(project / "data" / "models" / "tiny", run / "control" / name)
    measured: dict[str, dict[str, Any]] = {}
    real = stage._evaluate

    def once_by_class(path: Path, *args: Any, **kwargs: Any) -> dict[str, Any]:
        key = "dense" if path.name in ("tiny", "model") else path.name  # the child here is its parent
        if key not in measured:
            measured[key] = real(path, *args, **kwargs)
        return measured[key]

    monkeypatch.setattr(stage, "_evaluate", once_by_class)
    monkeypatch.setattr(stage, "_speeds", lambda folders, ids, scratch: {"engines": [], "of": list(folders)})
    stage.evaluate("tiny")
    evaluation = json.loads((run / "evaluation.json").read_text())
    assert evaluation["child"].keys() == evaluation["dense"].keys() | {"multiple"}
    assert "child" in evaluation["speed"]["of"]
    assert evaluation["child"]["loss"] == evaluation["dense"]["loss"]
    assert evaluation["difference"]["trained_child"] == evaluation["difference"]["trained_dense"]
    assert evaluation["difference"]["trained_child"]["stderr"] > 0
    assert evaluation["difference"]["trained_dense_trained"] == evaluation["difference"]["trained_child"]
    assert summary.titles(evaluation)[3:] == ["dense child", "parent trained alike"]
    assert all("child" in sample for sample in json.loads((run / "samples.json").read_text())["samples"])
    assert all("child" in entry for entry in json.loads((run / "windows.json").read_text()).values())
    shutil.rmtree(run / "control")
    for name, text in kept.items():
        (run / name).write_text(text)


def test_every_figure_says_what_it_rests_on(judgement: dict[str, Any]) -> None:
    assert judgement["test"]["seq_len"] == 64
    for counted in judgement["test"]["domains"].values():
        assert counted["windows"] == 6
        assert counted["tokens"] == 6 * 63
        assert counted["tokens"] <= counted["bytes"] <= 20 * counted["tokens"]
    for model in ("dense", "split", "trained"):
        score = judgement[model]["tasks"]["hellaswag_100"]
        assert (score["n"], score["num_fewshot"]) == (8, 0)
        assert {"acc_stderr", "acc_norm_stderr", "harness", "dtype"} < set(score)
        assert score["chance"] == 0.25
    assert judgement["machine"]["cores"] >= 1


def test_a_task_out_of_reach_is_named_and_the_rest_is_judged(judgement: dict[str, Any]) -> None:
    assert list(judgement["missing"]) == ["snli"]
    assert "stanfordnlp/snli" in judgement["missing"]["snli"]
    for key in ("dense", "split", "trained"):
        assert judgement[key]["tasks"].keys() == {"hellaswag_100", "sst2", "adv_sst2"}
    assert "Not judged: snli (" in summary.tasks(judgement)


def test_differences_and_gaps_can_be_computed_again_from_what_each_item_scored(
    judgement: dict[str, Any], project: Path
) -> None:
    items = json.loads((project / "runs" / "tiny" / "items.json").read_text())
    assert {task: len(entry["items"]) for task, entry in items.items()} == {
        "hellaswag_100": 8,
        "sst2": 6,
        "adv_sst2": 6,
    }
    assert judgement["paired"]["tasks"] == paired.differences(items)
    (pair,) = judgement["robustness"]
    assert (pair["of"], pair["task"], pair["kind"]) == ("sst2", "adv_sst2", "adversarial")
    for model in ("dense", "split", "trained"):
        accuracies = [np.mean(items[task]["metrics"]["acc"][model]) for task in ("sst2", "adv_sst2")]
        assert pair["models"][model]["gap"] == pytest.approx(accuracies[0] - accuracies[1])
        assert judgement[model]["tasks"]["sst2"]["acc"] == pytest.approx(accuracies[0])


def test_sizes_are_those_of_the_checkpoints(judgement: dict[str, Any], project: Path) -> None:
    from transformers import AutoModelForCausalLM

    for model, folder in {"dense": "data/models/tiny", "trained": "runs/tiny/trained"}.items():
        total = AutoModelForCausalLM.from_pretrained(project / folder).num_parameters()
        assert judgement[model]["parameters"]["total"] == total
    assert judgement["dense"]["parameters"]["active"] == judgement["dense"]["parameters"]["total"]
    assert judgement["trained"]["parameters"]["active"] < judgement["trained"]["parameters"]["total"]


def test_recovery_is_the_share_of_the_lost_loss_that_came_back(judgement: dict[str, Any]) -> None:
    dense, split, trained = (judgement[model]["loss"]["mean"] for model in ("dense", "split", "trained"))
    assert judgement["recovery"] == pytest.approx((split - trained) / (split - dense))
    assert judgement["difference"]["trained_dense"]["loss"] == pytest.approx(trained - dense)
    assert judgement["difference"]["trained_split"]["stderr"] > 0


def test_every_token_of_the_windows_is_routed_to_top_k_experts(judgement: dict[str, Any], project: Path) -> None:
    routing = json.loads((project / "runs" / "tiny" / "routing.json").read_text())
    for model in ("split", "trained"):
        for load in routing[model].values():
            assert [sum(layer) for layer in load] == [6 * 64 * 2] * 2
            assert [len(layer) for layer in load] == [4, 4]


def test_the_worst_layer_is_that_of_the_written_counts_which_take_one_line(
    judgement: dict[str, Any], project: Path
) -> None:
    text = (project / "runs" / "tiny" / "routing.json").read_text()
    assert len(text.splitlines()) == 1
    load = np.sum(list(json.loads(text)["trained"].values()), axis=0)
    shares = np.sort(load, axis=1)[:, -2:].sum(1) / load.sum(1)
    worst = judgement["routing"]["trained"]["worst"]
    assert (worst["layer"], worst["busiest"]) == (shares.argmax(), round(shares.max(), 4))
    assert judgement["routing"]["trained"]["layers"]["busiest"] == shares.round(4).tolist()
    assert (judgement["routing"]["experts"], judgement["routing"]["top_k"]) == (4, 2)


def test_speeds_are_measured_as_a_user_gets_them_in_every_engine(judgement: dict[str, Any]) -> None:
    measured = judgement["speed"]
    assert (measured["prompt"], measured["after"], measured["new"]) == (64, 16, 16)
    engines = [(row["engine"], row["dtype"], row["threads"]) for row in measured["engines"]]
    assert engines == [("transformers", "float32", 1), ("moe_kernels", "float32", 1), ("llama.cpp", "Q8_0", 1)]
    for row in measured["engines"]:
        assert list(row["models"]) == ["dense", "trained"]
        assert row["models"]["dense"]["ratio"]["decode"] == {"median": 1, "min": 1, "max": 1}
        for figures in row["models"].values():
            for what in ("prompt", "decode"):
                assert 0 < figures[what]["min"] <= figures[what]["median"] <= figures[what]["max"]
            assert figures["first_token"] == pytest.approx(64 / figures["prompt"]["median"], rel=1e-3)
    experts = [row["models"]["trained"].get("experts") for row in measured["engines"]]
    assert experts == ["grouped_mm", "moe_kernels", None]


def test_samples_are_what_generate_writes(judgement: dict[str, Any], project: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    written = json.loads((project / "runs" / "tiny" / "samples.json").read_text())
    for model, folder in {"dense": "data/models/tiny", "trained": "runs/tiny/trained"}.items():
        loaded = AutoModelForCausalLM.from_pretrained(project / folder)
        tokenizer = AutoTokenizer.from_pretrained(project / folder)
        for sample in written["samples"]:
            ids = tokenizer(sample["prompt"], return_tensors="pt")["input_ids"]
            made = loaded.generate(ids, max_new_tokens=written["new_tokens"], do_sample=False, pad_token_id=0)
            assert sample[model] == tokenizer.decode(made[0, ids.shape[1] :], skip_special_tokens=True)


def test_a_finished_evaluation_leaves_no_partial_results(judgement: dict[str, Any], project: Path) -> None:
    assert list((project / ".scratch" / "evaluate-tiny").rglob("*.json")) == []


def test_a_corpus_of_another_tokenizer_is_refused(judgement: dict[str, Any], project: Path) -> None:
    path = project / "data" / "models" / "tiny" / "tokenizer.json"
    good = path.read_text()
    tokenizer = json.loads(good)
    tokenizer["model"]["merges"] = tokenizer["model"]["merges"][:-1]
    path.write_text(json.dumps(tokenizer))
    try:
        with pytest.raises(ValueError, match="data/models/tiny"):
            stage.evaluate("tiny")
    finally:
        path.write_text(good)


def test_the_cards_snippet_gives_the_reports_perplexity_with_torch_and_transformers_alone(
    judgement: dict[str, Any], project: Path
) -> None:
    model = project / "runs" / "tiny" / "trained"
    shutil.copy(project / "runs" / "tiny" / "heldout.json", model / "heldout.json")
    guard = (
        "import sys\n"
        "class Guard:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name.split('.')[0] in ('tasks', 'flows', 'moe_kernels'):\n"
        "            raise ModuleNotFoundError(name)\n"
        "sys.meta_path.insert(0, Guard())\n"
    )
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    command = [sys.executable, "-c", guard + card.SNIPPET]
    done = subprocess.run(command, cwd=model, env=environment, capture_output=True, text=True, check=False)
    (model / "heldout.json").unlink()
    assert done.returncode == 0, done.stderr
    printed = {name: float(value) for name, value in re.findall(r"(\w+): perplexity ([\d.]+)", done.stdout)}
    assert set(printed) == {"prose", "code", "mean"}
    for domain, value in printed.items():
        assert value == pytest.approx(judgement["trained"]["perplexity"][domain], abs=0.011)


def test_windows_are_told_apart_and_their_nats_add_up(judgement: dict[str, Any], project: Path) -> None:
    """What the gate of retraining compares two evaluations by."""
    written = json.loads((project / "runs" / "tiny" / "windows.json").read_text())
    for domain, entry in written.items():
        counted = judgement["test"]["domains"][domain]
        assert len(set(entry["windows"])) == len(entry["bytes"]) == counted["windows"]
        assert sum(entry["bytes"]) == counted["bytes"]
        for model in ("dense", "split", "trained"):
            loss = sum(entry[model]) / counted["tokens"]
            assert loss == pytest.approx(judgement[model]["loss"][domain], abs=1e-4)


def test_unseen_text_is_judged_beside_the_trained_domains_and_the_gate_does_not_look_at_it(
    judgement: dict[str, Any], project: Path
) -> None:
    assert list(judgement["test"]["unseen"]) == ["talk"]
    assert judgement["test"]["unseen"]["talk"]["windows"] == 4
    ids = windows.unseen(project / "data/corpora/tiny", seq_len=64, count=4)
    model = checkpoint.load(project / "runs/tiny/trained")
    nats = likelihood.measure(model, ids, batch=4)["nats"]["talk"]
    assert judgement["trained"]["unseen"]["loss"]["talk"] == pytest.approx(sum(nats) / (4 * 63), rel=1e-5)
    losses = {key: judgement[key]["unseen"]["loss"]["mean"] for key in ("dense", "split", "trained")}
    assert judgement["trained"]["multiple"]["unseen"] == pytest.approx(math.exp(losses["trained"] - losses["dense"]))
    assert judgement["difference"]["unseen"]["trained_split"]["loss"] == pytest.approx(
        losses["trained"] - losses["split"]
    )
    for name in ("windows.json", "heldout.json"):
        assert set(json.loads((project / "runs/tiny" / name).read_text())) == {"prose", "code"}


def test_the_command_for_any_checkpoint_gives_the_figures_of_the_pipelines_own_evaluation(
    judgement: dict[str, Any], project: Path, tmp_path: Path
) -> None:
    trained, dense = Path("runs/tiny/trained"), Path("data/models/tiny")
    result = evaluate_checkpoints.run(
        [trained, dense], tmp_path, corpus="tiny", tasks=["hellaswag_100"], seq_len=64, windows=6
    )
    for key, model in zip(("trained", "dense"), result["models"], strict=True):
        for field in ("loss", "perplexity", "bits_per_byte", "unseen", "parameters", "flops_per_token"):
            assert model[field] == judgement[key][field], (key, field)
        assert model["tasks"] == {"hellaswag_100": judgement[key]["tasks"]["hellaswag_100"]}
    (difference,) = result["difference"]
    assert difference["domains"] == judgement["difference"]["trained_dense"]
    assert difference["unseen"] == judgement["difference"]["unseen"]["trained_dense"]
    assert result["text"]["domains"] == judgement["test"]["domains"]
    shutil.copy("runs/tiny/heldout.json", trained / "heldout.json")
    try:
        shipped = evaluate_checkpoints.run([trained], tmp_path)
    finally:
        (trained / "heldout.json").unlink()
    assert shipped["models"][0]["loss"] == judgement["trained"]["loss"]


def test_the_means_are_over_domains(judgement: dict[str, Any]) -> None:
    scores = judgement["trained"]
    mean = (scores["loss"]["prose"] + scores["loss"]["code"]) / 2
    assert scores["loss"]["mean"] == pytest.approx(mean)
    assert scores["perplexity"]["mean"] == pytest.approx(math.exp(mean))
