"""The report page, the model card and the table, from the files of a finished pipeline."""

from __future__ import annotations

import dataclasses
import json
import math
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import yaml

from tasks import settings
from tasks.evaluate import routing_balance, summary, unseen_table
from tasks.evaluate.report import __main__ as stage
from tasks.evaluate.report import card, corpus_section, frontier_section, hub_metadata, page, training_section
from tasks.evaluate.report import results as results_module
from tasks.evaluate.report.results import Results
from tests.finished_run import write_child, write_run

ROOT = Path(summary.__file__).parents[2]
VOID = {"meta", "br"}


class Page(HTMLParser):
    """Collects text and attributes, and fails on tags that are not nested."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.references: list[str] = []
        self.tags: set[str] = set()
        self.text = ""
        self.feed(html)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.references += [value or "" for name, value in attrs if name in {"src", "href", "xlink:href"}]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


def shown(results: Results) -> str:
    """The text of the page, with one space for each gap."""
    return " ".join(Page(page.render(results)).text.split())


def plain(html: str) -> str:
    """The same of a part of the page, with a space for each tag."""
    return " ".join(re.sub("<[^>]*>", " ", html).split())


@contextmanager
def changed(path: str) -> Iterator[Any]:
    """The content of a JSON file of the finished pipeline, written back at the end."""
    content = json.loads(Path(path).read_text())
    yield content
    Path(path).write_text(json.dumps(content))


def test_the_page_loads_nothing_and_parses(results: Results) -> None:
    html = page.render(results)
    parsed = Page(html)
    assert parsed.references == []
    assert not parsed.tags & {"script", "link", "img", "iframe"}
    assert not re.search(r"url\(|@import|https?://", html)


def test_the_page_names_every_domain_licence_source_and_setting(results: Results) -> None:
    text = shown(results)
    for name, domain in results.corpus.domains.items():
        assert name in text
        assert domain.license in text
        assert domain.source in text
    for name in ("smollm2-135m-q4", "pretrain.learning_rate", "partition.experts", "lm-eval", "deepspeed", "Python"):
        assert name in text
    assert "`" not in text.replace("there was `a`", "")  # which a model wrote


def test_the_page_shows_the_figures_of_the_evaluation(results: Results) -> None:
    text = shown(results)
    for model in ("dense", "split", "trained"):
        for domain in [*results.corpus.domains, "mean"]:
            assert f"{results.evaluation[model]['bits_per_byte'][domain]:.3f}" in text
    score = results.evaluation["trained"]["tasks"]["hellaswag_100"]
    assert f"{score['acc']:.3f} ± {score['acc_stderr']:.3f}" in text
    assert "n = 100, 0-shot, lm-eval 0.4.13, bfloat16" in text


def test_text_from_the_files_is_escaped(finished: Path) -> None:
    metrics = Path("data/corpora/demo.json")
    metrics.write_text(metrics.read_text().replace("BSD-3-Clause", "<script>alert(1)</script>&"))
    html = page.render(results_module.read("demo"))
    assert "<script>" not in html
    assert "&lt;script&gt;alert(1)&lt;/script&gt;&amp;" in html


def test_weights_that_never_change_get_no_chart(finished: Path) -> None:
    log = Path("runs/demo/training/log.jsonl")
    records = [json.loads(line) for line in log.read_text().splitlines()]
    log.write_text("".join(json.dumps({k: v for k, v in r.items() if k != "weights"}) + "\n" for r in records))
    html = page.render(results_module.read("demo"))
    assert "Domain weights" not in html
    assert "Validation loss on" in html


def test_the_recovered_loss_is_one_number_per_domain_and_the_same_everywhere(finished: Path) -> None:
    with changed("runs/demo/evaluation.json") as evaluation:
        dense, split, trained = (evaluation[key]["loss"] for key in summary.models(evaluation))
        split["code"] = dense["code"]  # the split lost nothing here
        trained["legal"] = split["legal"] + 0.074  # and training made this worse
    contents = results_module.read("demo")
    share = f"{contents.evaluation['recovery']:.0%}"
    assert share == "34%"
    html = page.render(contents)
    text = plain(html.split("Gap closed")[1].split("<h2>")[0])
    assert re.search(r"books [\d.]+ [\d.]+ [\d.]+ 34%", text)
    assert re.search(r"code [\d.]+ [\d.]+ [\d.]+ – ", text)
    assert re.search(r"legal [\d.]+ [\d.]+ [\d.]+ −10%", text)
    pattern = r"(?:Training recovered|mean [\d.]+ [\d.]+ [\d.]+) (\d+%)"
    stated = re.findall(pattern, plain(html))
    stated += re.findall(r"recovered (\d+%)", card.text(contents))
    assert len(stated) == 3
    assert set(stated) == {share}
    assert "moving domain weights" in html
    for name in contents.corpus.domains:
        start, end = contents.mixture["weights"][name], contents.pretrain["final_weights"][name]
        assert f"{start:.3f} → {end:.3f}" in html
        assert f"| {start:.3f} → {end:.3f} |" in card.text(contents)


def test_training_lists_what_it_reported_and_draws_the_parents_losses(results: Results) -> None:
    html = page.render(results)
    assert '<td class="wrap">layer 3: expert 7 had no token in 20 steps &lt;up to 24&gt;</td>' in html
    assert html.count('<path class="level s') == len(results.corpus.domains) + 1  # and the limit of the routing
    assert "Dashed: the dense parent" in html
    many = dataclasses.replace(results, events=results.events * 100)
    assert training_section.events(many)[-1] == {"step": "", "message": "60 more in training/log.jsonl"}


def test_a_run_without_references_or_events_shows_neither(finished: Path) -> None:
    with changed("runs/demo/pretrain.json") as metrics:
        for key in ("references", "validation_before", "validation_after"):
            del metrics[key]
    log = Path("runs/demo/training/log.jsonl")
    log.write_text("".join(line for line in log.read_text().splitlines(keepends=True) if '"event"' not in line))
    html = page.render(results_module.read("demo"))
    for absent in ("what training reported", "Dashed: the dense parent"):
        assert absent not in html


def test_the_sentence_on_training_names_what_was_trained_and_how(results: Results) -> None:
    settings = results.pipeline.pretrain.model_copy(update={"schedule": "wsd", "train": "router", "dynamic": None})
    pipeline = results.pipeline.model_copy(update={"pretrain": settings})
    sentence = training_section.summary(dataclasses.replace(results, pipeline=pipeline))
    assert "with a decay at the end (WSD)" in sentence
    assert "fixed domain weights, trained: router, balance `switch`" in sentence
    assert "187 tokens/s, 31% MFU on active parameters, 5.0 minutes" in sentence


def test_an_evaluation_without_tasks_recovery_or_error_still_gives_a_page(finished: Path) -> None:
    with changed("runs/demo/evaluation.json") as evaluation:
        del evaluation["recovery"]
        for difference in evaluation["difference"].values():
            del difference["stderr"]
        for model in summary.models(evaluation):
            evaluation[model]["tasks"] = {}
    text = shown(results_module.read("demo"))
    assert "hellaswag_100" not in text.split("Other sources and licences")[0]
    assert "recovered" not in text


def test_a_missing_file_is_named_with_what_writes_it(finished: Path) -> None:
    Path("runs/demo/validation.csv").unlink()
    with pytest.raises(FileNotFoundError, match=r"runs/demo/validation\.csv does not exist; the pretrain stage"):
        results_module.read("demo")


def test_the_shipped_checkpoint_shares_the_trained_files_and_adds_a_card(finished: Path) -> None:
    for _ in range(2):  # a second report replaces the first
        stage.report("demo")
    run = finished / "runs" / "demo"
    weights = "model.safetensors"
    assert (run / "model" / weights).stat().st_ino == (run / "trained" / weights).stat().st_ino
    assert (run / "model" / "heldout.json").stat().st_ino == (run / "heldout.json").stat().st_ino
    assert sorted(p.name for p in (run / "trained").iterdir()) == ["config.json", weights]
    assert (run / "report" / "index.html").read_text().startswith("<!doctype html>")


def test_the_model_card_has_metadata_that_a_hub_reads_and_the_table(results: Results) -> None:
    text = card.text(results)
    _, front, body = text.split("---\n", 2)
    data = yaml.safe_load(front)
    assert data["base_model"] == "HuggingFaceTB/SmolLM2-135M-Instruct"
    assert data["license"] == "apache-2.0"
    assert "datasets" not in data  # none of the demo's is one of the Hub
    assert data["metrics"] == ["perplexity", "accuracy"]
    for label, values in summary.rows(results.evaluation):
        assert f"| {label} | {' | '.join(values)} |" in body
    for note in summary.notes(results.evaluation):
        assert f"- {note}\n" in body
    assert "\n\n\n" not in body.split("```")[0]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Apache-2.0", {"license": "apache-2.0"}),
        ("MIT", {"license": "mit"}),
        ("GPL-3.0-or-later", {"license": "gpl-3.0"}),
        ("ODC-By-1.0", {"license": "odc-by"}),
        ("LLAMA 2 COMMUNITY LICENSE", {"license": "llama2"}),
        ("Llama 3.2 Community License", {"license": "llama3.2"}),
        ("PSF-2.0", {"license": "other", "license_name": "psf-2.0"}),
        ("MIT, BSD and Apache-2.0", {"license": "other", "license_name": "mit-bsd-and-apache-2.0"}),
    ],
)
def test_a_licence_is_an_id_of_the_hub_or_other_with_its_name(text: str, expected: dict[str, str]) -> None:
    assert hub_metadata.licence(text, file=None) == expected
    linked = {"license_link": "LICENSE"} if expected["license"] == "other" else {}
    assert hub_metadata.licence(text, file="LICENSE") == expected | linked


def test_base_model_and_datasets_are_ids_of_the_hub_or_left_out(results: Results) -> None:
    sources = [
        "hub:allenai/c4@1588ec454efa1a09f29cd18ddd04fe05fc8653a2",
        "hf://datasets/HuggingFaceFW/fineweb-edu/sample/10BT/*.parquet",
        "hf://datasets/HuggingFaceFW/fineweb-edu@main/sample/100BT/*.parquet",
        "s3://bucket/org/name/*.jsonl",
        "dir:org/name",
    ]
    domains = {
        f"d{i}": settings.Domain(
            source=source, format="dataset" if source.startswith("hub:") else "jsonl", license="MIT"
        )
        for i, source in enumerate(sources)
    }
    corpus = results.corpus.model_copy(update={"domains": domains})
    for model, expected in (
        ({"source": "hub:org/model@main", "hub_id": None}, "org/model"),
        ({"source": "dir:org/model", "hub_id": None}, None),
        ({"source": "dir:weights", "hub_id": "org/model"}, "org/model"),
    ):
        other = dataclasses.replace(results, corpus=corpus, model=results.model.model_copy(update=model))
        data = yaml.safe_load(hub_metadata.front_matter(other))
        assert data.get("base_model") == expected
        assert data["datasets"] == ["allenai/c4", "HuggingFaceFW/fineweb-edu"]


def test_the_card_counts_the_tokens_that_were_trained_on(results: Results) -> None:
    text = card.text(results)
    for name, tokens in results.pretrain["domain_tokens"].items():
        assert f"| {name} | {tokens:,} | 0.012 |" in text
        assert f"{results.corpus_metrics['domains'][name]['tokens']['train']:,}" not in text


@pytest.mark.parametrize(
    ("partition", "config", "words"),
    [
        ({}, {}, "Each FFN of smollm2-135m-q4 is split into 96 routed experts of 12 neurons beside 48 shared ones"),
        ({"method": "copy", "shared_experts": 0}, {}, "is copied, whole or in slices, into 96 routed experts"),
        (
            {"method": "moebert", "shared_experts": 0},
            {},
            "is divided into 96 routed experts of 12 neurons, which may share neurons",
        ),
        (
            {"method": "random", "shared_experts": 0},
            {"model_type": "qwen3_moe", "num_experts": 96, "moe_intermediate_size": 12, "mlp_only_layers": [0, 2]},
            "Each FFN of smollm2-135m-q4 in 28 of its 30 layers is split into 96 routed experts of 12 neurons (method",
        ),
    ],
)
def test_the_words_follow_the_method(
    results: Results, partition: dict[str, object], config: dict[str, object], words: str
) -> None:
    knobs = results.pipeline.partition.model_copy(update=partition)
    pipeline = results.pipeline.model_copy(update={"partition": knobs})
    evaluation = results.evaluation | {"method": knobs.method}
    other = dataclasses.replace(results, pipeline=pipeline, config=results.config | config, evaluation=evaluation)
    assert words in card.shape(other)
    for text in (card.text(other), shown(other)):
        assert words in " ".join(text.split())
        assert ("after the split" in text) == (knobs.method != "copy")
        assert ("after copying" in text) == (knobs.method == "copy")


def test_only_scores_within_two_errors_of_random_guessing_are_listed_as_such(results: Results) -> None:
    # 0.25 ± 0.0433: up to 0.3366 may be a guess
    sentence = summary.tasks(results.evaluation)
    start = "hellaswag_100: random guessing scores 0.250 ± 0.043; within two standard errors of it: "
    assert sentence.startswith(start)
    assert "acc 0.320 (dense parent)" in sentence
    assert "acc_norm 0.390" not in sentence
    assert "acc_norm 0.316 (after the split)" in sentence
    evaluation = json.loads(json.dumps(results.evaluation))
    for key in summary.models(evaluation):
        evaluation[key]["tasks"]["hellaswag_100"].update(acc=0.62, acc_norm=0.05)
    assert "; no score is within two of its errors." in summary.tasks(evaluation)
    for key in summary.models(evaluation):
        del evaluation[key]["tasks"]["hellaswag_100"]["chance"]
    assert "guessing" not in summary.tasks(evaluation)
    guessless = dataclasses.replace(results, evaluation=evaluation)
    assert "chance" not in shown(guessless)
    assert "chance" not in card.text(guessless)


def test_speeds_stand_with_engine_dtype_and_threads_beside_the_parents_and_as_multiples_of_it(
    results: Results,
) -> None:
    rows = dict(summary.speeds(results.evaluation))
    assert rows == {
        "tokens/s, prompt: transformers float32, 2 threads": ["400", "–", "120 (0.30 ×)"],
        "tokens/s, decode: transformers float32, 2 threads": ["20", "–", "6 (0.30 ×)"],
        "tokens/s, prompt: moe_kernels float32, 2 threads": ["400", "–", "432 (1.08 ×)"],
        "tokens/s, decode: moe_kernels float32, 2 threads": ["20", "–", "8 (0.40 ×)"],
        "tokens/s, prompt: llama.cpp Q8_0, 1 thread": ["400", "–", "440 (1.10 ×)"],
        "tokens/s, decode: llama.cpp Q8_0, 1 thread": ["20", "–", "22 (1.10 ×)"],
        "tokens/s, prompt: llama.cpp Q8_0, 2 threads": ["400", "–", "480 (1.20 ×)"],
        "tokens/s, decode: llama.cpp Q8_0, 2 threads": ["20", "–", "24 (1.20 ×)"],
    }
    basis = summary.speed_basis(results.evaluation)
    for label in ("AMD EPYC, 2 cores", "512 tokens at once", "medians of 3 repeats", "(experts: grouped_mm)"):
        assert label in basis
    for text in (shown(results), card.text(results)):
        assert "24 (1.20 ×)" in text
        assert "AMD EPYC, 2 cores; prompt: 512 tokens at once" in " ".join(text.split())


def test_decode_speed_is_a_headline_and_the_axis_of_a_chart_of_quality_by_the_best_engine_that_runs(
    finished: Path,
) -> None:
    write_child(finished)
    contents = results_module.read("demo")
    (tile,) = [tile for tile in page.tiles(contents.evaluation) if "speed" in tile["label"]]
    assert tile["value"] == "1.20×"
    assert tile["note"] == "prompt 1.20×, dense child 1.25×; llama.cpp Q8_0, 2 threads"
    chart = frontier_section.section(contents).figures[0].chart
    assert "decode, tokens/s: llama.cpp Q8_0, 2 threads" in chart
    assert re.findall(r"<title>([^:]*): ", chart) == summary.titles(contents.evaluation)
    assert "Quality and speed" in page.render(contents)

    for row in contents.evaluation["speed"]["engines"][2:]:
        row["models"]["trained"] = {"reason": "48 chosen experts in 30 layers; at most 27"}
    assert "moe_kernels float32, 2 threads" in frontier_section.section(contents).figures[0].chart
    assert dict(summary.speeds(contents.evaluation))["tokens/s, decode: llama.cpp Q8_0, 2 threads"][2] == "–"
    sentence = "llama.cpp does not run: after training (48 chosen experts in 30 layers; at most 27)."
    assert summary.speed_basis(contents.evaluation).count(sentence) == 1
    assert sentence in shown(contents)
    del contents.evaluation["speed"]
    assert summary.speeds(contents.evaluation) == []
    assert "Quality and speed" not in page.render(contents)


def test_experts_that_the_default_cannot_run_are_said_to_need_another_implementation(results: Results) -> None:
    assert "experts_implementation='eager'" not in summary.speed_basis(results.evaluation)
    evaluation = json.loads(json.dumps(results.evaluation))
    evaluation["speed"]["engines"][0]["models"]["trained"]["experts"] = "eager"
    assert "load the model with experts_implementation='eager'" in summary.speed_basis(evaluation)


def test_a_collapsed_layer_is_named_with_a_warning_everywhere(finished: Path) -> None:
    loads = json.loads(Path("runs/demo/routing.json").read_text())["trained"]
    for load in loads.values():
        load[11] = [1000] * 28 + [250] * 4 + [50] * 60 + [0] * 4  # of 96, of which 32 are chosen
    with changed("runs/demo/evaluation.json") as evaluation:
        assert not summary.collapsed(evaluation)
        assert summary.routing(evaluation).startswith("Most uneven routing: layer ")
        evaluation["routing"]["trained"] = routing_balance.balance(loads, layers=range(30), top_k=32)
    assert evaluation["routing"]["trained"]["worst"]["busiest"] == pytest.approx(29 / 32, abs=1e-4)
    contents = results_module.read("demo")
    warning = (
        "Warning: collapsed routing in 1 of 30 sparse layers (limit: 67% of the load on the 32 busiest). Most uneven "
        "routing: layer 11, where 32 of 96 experts take 91% of the load (if even, 33%; if always the same 32, 100%) "
        "and 4 get no token."
    )
    for text in (shown(contents), card.text(contents)):
        assert warning in " ".join(text.split())
    assert summary.notes(evaluation)[0] == warning


def test_what_the_models_write_stands_side_by_side_and_is_no_markup(results: Results) -> None:
    html, text = page.render(results), card.text(results)
    parsed = Page(html)
    assert "there was `a` <b>|cat|</b>\n\n# heading\ufffd" in parsed.text
    assert "<b>|cat|</b>" not in html
    assert "\n    there was `a` <b>|cat|</b>\n    \n    # heading\ufffd\n" in text
    assert text.count("dense parent:\n\n    Paris.") == 1


def test_the_page_draws_errors_rates_and_gradients_and_says_how_long_each_stage_took(results: Results) -> None:
    html = page.render(results)
    for title in ("Error of each layer after the split", "Learning rate", "Gradient norm", "Load of the 32 busiest"):
        assert f"<figure><h3>{title}" in html
    text = plain(html)
    assert "Largest: 7.9% in layer 29." in text
    assert "Parts with other peaks, on the same curve: router 4e-07." in text
    assert (
        "corpus, sum over processes 30.0 s mixture 12.3 s partition 3.4 minutes pretrain 5.0 minutes "
        "evaluate 2.6 minutes" in text
    )
    assert re.search(r"paired by window: \+0\.\d+ ± 0\.\d+ compared with the dense parent, −0\.\d+ ±", text)


def test_one_domain_and_one_sparse_layer_without_text_give_a_page_and_a_card(finished: Path) -> None:
    with changed("runs/demo/routing.json") as routing, changed("runs/demo/evaluation.json") as evaluation:
        for key, loads in routing.items():
            routing[key] = {"code": loads["code"][:1]}
            evaluation["routing"][key] = routing_balance.balance(routing[key], layers=[7], top_k=32)
        evaluation["test"]["domains"] = {"code": evaluation["test"]["domains"]["code"]}
    with changed("runs/demo/partition.json") as partition:
        partition["layer_error"] = {}
    contents = results_module.read("demo")
    text = shown(contents)
    assert "No error per layer: the method reads no text." in text
    assert "Specialisation" not in text
    assert "layer 7, where 32 of 96" in text
    assert "layer 7, where 32 of 96" in card.text(contents)


def test_a_model_that_stayed_dense_gives_a_page_and_a_card(finished: Path) -> None:
    with changed("runs/demo/evaluation.json") as evaluation, changed("runs/demo/routing.json") as routing:
        evaluation["routing"] = {"experts": 0, "top_k": 0, "split": {}, "trained": {}}
        routing |= {"split": {}, "trained": {}}
        del evaluation["speed"]["engines"][1]  # that of moe_kernels
        del evaluation["speed"]["engines"][0]["models"]["trained"]["experts"]
    dense = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "num_hidden_layers": 30}
    Path("runs/demo/trained/config.json").write_text(json.dumps(dense))
    contents = results_module.read("demo")
    for text in (Page(page.render(contents)).text, card.text(contents)):
        assert "All 30 layers of smollm2-135m-q4 stay dense (LlamaForCausalLM)." in " ".join(text.split())
        assert "moe_kernels" not in text
        assert "routing" not in text


def test_the_table_for_the_terminal_needs_no_heavy_import(finished: Path) -> None:
    code = (
        "import runpy, sys; sys.argv = ['summary', 'demo']\n"
        "try: runpy.run_module('tasks.evaluate.summary', run_name='__main__')\n"
        "except SystemExit as end: assert end.code == 0\n"
        "assert not {'torch', 'transformers', 'lm_eval', 'numpy'} & set(sys.modules)"
    )
    environment = {"PYTHONPATH": str(ROOT), "COLUMNS": "120"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "0.390 ± 0.049" in done.stdout
    assert "32 test windows of 512 tokens" in done.stdout


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda text: None, "runs/demo/evaluation.json does not exist; `moeforge run demo` writes it"),
        (lambda text: text[:-9], "runs/demo/evaluation.json is not JSON ("),
        (
            lambda text: text.replace('"bits_per_byte"', '"bpb"'),
            "runs/demo/evaluation.json lacks the key 'bits_per_byte'",
        ),
    ],
    ids=["missing", "cut", "another version's"],
)
def test_without_a_whole_evaluation_the_table_is_one_line_with_the_file_and_the_fix(
    finished: Path,
    change: Callable[[str], str | None],
    message: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    path = Path("runs/demo/evaluation.json")
    text = change(path.read_text())
    path.unlink()
    if text is not None:
        path.write_text(text)
    monkeypatch.setattr(sys, "argv", ["summary", "demo"])
    assert summary.main() == 1
    printed = capsys.readouterr().err
    assert printed.startswith(f"summary: {message}")
    assert "`moeforge run demo` writes it" in printed
    assert printed.count("\n") == 1


def test_the_corpus_section_shows_each_domain_what_it_lost_and_two_charts(results: Results) -> None:
    html = page.render(results)
    text = plain(html.split("<h2>Corpus</h2>")[1].split("<h2>")[0])
    assert "code pypi:sympy==1.14.0/sympy/**/*.py BSD-3-Clause 1,432 / 22 / 22 2,817,345 / 45,617 / 45,616" in text
    assert "Tokenised by fastokens, compared with the reference tokenizer on 12,345 probes and 678 documents" in text
    assert (
        "records read 2,000 2,000 2,000 2,000 empty 0.1% 0.1% 0.1% 0.1% duplicate – 2.1% 4.2% 6.3% kept 99.9%" in text
    )
    assert "bad" not in text.split("records read")[1]
    assert html.count("512 to 1,023: ") == len(results.corpus.domains)
    shares = re.findall(r'<td class="n">([\d.]+)%</td><td class="n">3\.14</td>', html)
    assert sum(map(float, shares)) == pytest.approx(100, abs=0.3)


def test_a_domain_without_records_has_no_shares() -> None:
    entries = {"code": {"rules": {"read": 0, "kept": 0}}, "books": {"rules": {"read": 4, "empty": 1, "kept": 3}}}
    assert corpus_section.drops(entries) == [
        ("records read", ["0", "4"]),
        ("empty", ["–", "25.0%"]),
        ("kept", ["–", "75.0%"]),
    ]


def test_lengths_are_read_as_powers_of_two(finished: Path) -> None:
    Path("data/corpora/demo.lengths.csv").write_text(
        "domain,tokens_from,documents,tokens\ncode,1,2,2\ncode,512,3,1800\n"
    )
    assert results_module.read("demo").lengths == {"code": {0: 2, 9: 3}}


def test_a_dense_child_is_a_column_of_table_page_and_card_and_one_sentence_says_who_is_better(finished: Path) -> None:
    without = results_module.read("demo")
    assert summary.rival(without.evaluation) == ""
    assert "child" not in without.evaluation
    assert "dense child" not in shown(without) + card.text(without)
    write_child(finished)
    results = results_module.read("demo")
    assert summary.titles(results.evaluation) == ["dense parent", "after the split", "after training", "dense child"]
    sentence = summary.rival(results.evaluation)
    assert sentence == (
        "With 106.3 M active parameters, 1.08 × the dense child's 98.0 M, and after the same training, the "
        "Mixture-of-Experts is better: mean loss −0.110 ± 0.000 nats/token compared with the dense child, paired by "
        "window."
    )
    assert sentence in summary.notes(results.evaluation)
    text = shown(results)
    assert sentence in text
    assert sentence in card.text(results)
    assert f"{results.evaluation['child']['bits_per_byte']['mean']:.3f}" in text
    assert all(len(values) == 4 for _, values in summary.rows(results.evaluation))
    assert "| | dense parent | after the split | after training | dense child |" in card.text(results)
    assert 'class="m3 dot"' in page.render(results)
    assert ("control", "4.0 minutes") in page.times(results)
    assert "control" not in dict(page.times(without))
    gap = page.render(results).split("Gap closed")[1].split("</thead>")[0]
    assert "dense child" not in gap
    rows = dict(summary.speeds(results.evaluation))
    label = "tokens/s, prompt: moe_kernels float32, 2 threads"
    assert rows[label] == ["400", "–", "432 (1.08 ×)", "600 (1.50 ×)"]


@pytest.mark.parametrize(
    ("child", "begins"),
    [
        (101e6, "At equal active parameters (100.0 M, dense child 101.0 M) and after the same training, "),
        (98.5e6, "At equal active parameters (100.0 M, dense child 98.5 M) and after the same training, "),
        (103e6, "With 100.0 M active parameters, 0.97 × the dense child's 103.0 M, and after the same training, "),
        (50e6, "With 100.0 M active parameters, 2.00 × the dense child's 50.0 M, and after the same training, "),
    ],
)
def test_active_parameters_are_called_equal_within_two_percent(child: float, begins: str) -> None:
    sizes = {"trained": 100e6, "child": child}
    evaluation = {name: {"parameters": {"active": size}} for name, size in sizes.items()}
    assert summary.rival(evaluation | {"difference": {"trained_child": {"loss": -0.1}}}).startswith(begins)


def test_a_difference_within_two_standard_errors_is_nobodys(finished: Path) -> None:
    write_child(finished)
    evaluation = results_module.read("demo").evaluation
    for loss, stderr, verdict in (
        (0.1, 0.06, "neither is better by two standard errors: mean loss +0.100 ± 0.060"),
        (0.1, 0.04, "the dense child is better: mean loss +0.100 ± 0.040"),
        (-0.1, 0.04, "the Mixture-of-Experts is better: mean loss −0.100 ± 0.040"),
    ):
        evaluation["difference"]["trained_child"] = {"loss": loss, "stderr": stderr}
        assert verdict in summary.rival(evaluation)


def test_unseen_text_has_rows_of_its_own_and_both_multiples_of_the_parent_stand_side_by_side(
    finished: Path, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    without = results_module.read("demo")
    assert unseen_table.rows(without.evaluation, summary.models(without.evaluation)) == []
    assert unseen_table.sentence(without.evaluation) == ""
    assert "nseen text" not in shown(without) + card.text(without)
    assert without.evaluation["trained"]["multiple"] == {"domains": pytest.approx(math.exp(0.49))}
    root = tmp_path_factory.mktemp("unseen")
    content = json.loads((finished / "pipelines.yaml").read_text())
    for name in ("speeches", "docs"):
        domain = {
            **content["corpora"]["demo"]["domains"]["code"],
            "unseen": True,
            "source": "hub:org/talks@" + "0" * 40,
        }
        content["corpora"]["demo"]["domains"][name] = domain | {"format": "dataset", "sha256": None}
    (root / "pipelines.yaml").write_text(json.dumps(content))
    write_run(root)
    write_child(root)
    monkeypatch.chdir(root)
    results = results_module.read("demo")
    evaluation = results.evaluation
    assert evaluation["test"]["unseen"]["docs"]["windows"] == 4
    assert set(evaluation["trained"]["loss"]) == {*results.corpus.trained, "mean"}  # by which the gate judges
    assert evaluation["difference"]["unseen"].keys() == evaluation["difference"].keys() - {"unseen"}
    rows = dict(summary.rows(evaluation))
    assert rows["perplexity / the parent's: trained domains"] == ["–", "2.10 ×", "1.63 ×", "1.82 ×"]
    assert rows["perplexity / the parent's: unseen domains"] == ["–", "2.43 ×", "1.80 ×", "2.05 ×"]
    assert rows["bits/byte, unseen: docs"] == rows["bits/byte, unseen: mean"]
    sentence = unseen_table.sentence(evaluation)
    assert sentence == (
        "Unseen text (speeches, docs: 8 windows), of which no stage has read any: after training the perplexity is "
        "1.80 × the parent's, on the trained domains 1.63 ×; mean loss, in nats/token and paired by window: +0.588 ± "
        "0.000 compared with the dense parent (minus that on the trained domains: +0.098 ± 0.000), −0.132 ± 0.000 "
        "compared with the dense child."
    )
    assert sentence in summary.notes(evaluation)
    text = shown(results)
    assert sentence in text
    assert sentence in card.text(results)
    assert "; 1.80× on unseen text" in text
    assert "| docs | 0 | 0.000 | unseen |" in card.text(results)
    assert hub_metadata.datasets(results) == []
