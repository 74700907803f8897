"""The report page, the model card and the table, from the files of a finished pipeline."""

from __future__ import annotations

import dataclasses
import json
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
import yaml

from tasks.evaluate import card, corpus, page, report, summary, training
from tasks.evaluate import results as results_module
from tasks.evaluate.results import Results

VOID = {"meta", "br"}


class Page(HTMLParser):
    """Collects text and attributes, and fails on a tag that is closed out of turn."""

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


def test_the_page_loads_nothing_and_parses(results: Results) -> None:
    html = page.render(results)
    parsed = Page(html)
    assert parsed.references == []
    assert not parsed.tags & {"script", "link", "img", "iframe"}
    assert not re.search(r"url\(|@import|https?://", html)


def test_the_page_names_every_domain_licence_source_and_setting(results: Results) -> None:
    text = " ".join(Page(page.render(results)).text.split())
    for name, domain in results.corpus.domains.items():
        assert name in text
        assert domain.license in text
        assert domain.source in text
    for name in ("smollm2-135m-q4", "pretrain.learning_rate", "partition.experts", "lm-eval", "deepspeed", "Python"):
        assert name in text
    assert "bits per byte on test text is the judge" in text


def test_the_page_shows_the_figures_of_the_evaluation(results: Results) -> None:
    text = " ".join(Page(page.render(results)).text.split())
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


def test_weights_that_stood_still_get_no_chart(finished: Path) -> None:
    log = Path("runs/demo/training/log.jsonl")
    records = [json.loads(line) for line in log.read_text().splitlines()]
    log.write_text("".join(json.dumps({k: v for k, v in r.items() if k != "weights"}) + "\n" for r in records))
    html = page.render(results_module.read("demo"))
    assert "Domain weights" not in html
    assert "Validation loss per domain" in html


def test_the_page_says_how_much_of_the_gap_each_domain_closed(finished: Path) -> None:
    path = Path("runs/demo/pretrain.json")
    metrics = json.loads(path.read_text())
    metrics["validation_before"]["code"] = metrics["references"]["code"]  # the split lost nothing here
    metrics["validation_after"]["legal"] = (
        metrics["validation_before"]["legal"] + 0.074
    )  # and training made this worse
    path.write_text(json.dumps(metrics))
    html = page.render(results_module.read("demo"))
    text = " ".join(re.sub("<[^>]*>", " ", html.split("Gap closed")[1].split("<h2>")[0]).split())
    assert "books 4.360 4.110 3.620 34%" in text
    assert "code 2.050 2.540 2.050 –" in text
    assert "legal 3.050 3.124 2.310 −10%" in text
    # (0.25 - 0.49 - 0.074 + 0.25) of (0.74 + 0 + 0.74 + 0.74)
    assert "mean 3.258 3.274 2.703 −3%" in text


def test_training_lists_what_it_reported_and_draws_the_parents_losses(results: Results) -> None:
    html = page.render(results)
    assert '<td class="wrap">layer 3: expert 7 had no token in 20 steps &lt;up to 24&gt;</td>' in html
    assert html.count('<path class="level s') == len(results.corpus.domains)
    assert "Dashed: the dense parent" in html
    many = dataclasses.replace(results, events=results.events * 100)
    assert training.events(many)[-1] == {"step": "", "message": "and 60 more, in training/log.jsonl"}


def test_a_run_without_references_or_events_gets_neither_table(finished: Path) -> None:
    path = Path("runs/demo/pretrain.json")
    metrics = json.loads(path.read_text())
    for key in ("references", "validation_before", "validation_after"):
        del metrics[key]
    path.write_text(json.dumps(metrics))
    log = Path("runs/demo/training/log.jsonl")
    log.write_text("".join(line for line in log.read_text().splitlines(keepends=True) if '"event"' not in line))
    html = page.render(results_module.read("demo"))
    for absent in ("Gap closed", "what training reported", "Dashed", '<path class="level'):
        assert absent not in html


def test_the_sentence_on_training_names_what_was_trained_and_how(results: Results) -> None:
    settings = results.pipeline.pretrain.model_copy(update={"schedule": "wsd", "train": "router", "dynamic": None})
    pipeline = results.pipeline.model_copy(update={"pretrain": settings})
    sentence = training.what(dataclasses.replace(results, pipeline=pipeline))
    assert "with a decay at the end (WSD)" in sentence
    assert "fixed domain weights, trained: router, balance `" in sentence
    assert "187 tokens/s, 31% MFU on active parameters, 5.0 minutes" in sentence


def test_an_evaluation_without_tasks_recovery_or_error_still_gives_a_page(finished: Path) -> None:
    path = Path("runs/demo/evaluation.json")
    evaluation = json.loads(path.read_text())
    del evaluation["recovery"], evaluation["difference"]["trained_split"]["stderr"]
    for model in ("dense", "split", "trained"):
        evaluation[model]["tasks"] = {}
    path.write_text(json.dumps(evaluation))
    text = Page(page.render(results_module.read("demo"))).text
    assert "hellaswag_100" not in text.split("Other sources and licences")[0]
    assert "won back" not in text


def test_a_missing_file_is_named_with_what_writes_it(finished: Path) -> None:
    Path("runs/demo/validation.csv").unlink()
    with pytest.raises(FileNotFoundError, match=r"runs/demo/validation\.csv: not there; the pretrain stage"):
        results_module.read("demo")


def test_the_shipped_checkpoint_shares_the_trained_files_and_adds_a_card(finished: Path) -> None:
    for _ in range(2):  # a second report replaces the first
        report.report("demo")
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
    assert data["base_model"] == "smollm2-135m-q4"
    assert data["license"] == "apache-2.0"
    assert data["datasets"] == [domain.source for domain in results.corpus.domains.values()]
    assert {"perplexity", "bits_per_byte", "accuracy"} <= set(data["metrics"])
    for label, values in summary.rows(results.evaluation):
        assert f"| {label} | {' | '.join(values)} |" in body
    assert "\n\n\n" not in body.split("```")[0]


def test_the_table_for_the_terminal_needs_no_heavy_import(finished: Path) -> None:
    import subprocess
    import sys

    root = Path(summary.__file__).parents[2]
    code = (
        "import sys; from tasks.evaluate import summary; from rich.console import Console; "
        "Console(width=120).print(summary.table('demo')); "
        "assert not {'torch', 'transformers', 'lm_eval', 'numpy'} & set(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], env={"PYTHONPATH": str(root)}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "0.390 ± 0.049" in done.stdout
    assert "32 test windows of 512 tokens" in done.stdout


def test_a_table_before_the_evaluation_says_how_to_get_one(finished: Path) -> None:
    with pytest.raises(FileNotFoundError, match="`moeforge run other` writes it"):
        summary.read("other")


def test_the_corpus_section_shows_each_domain_what_it_lost_and_two_charts(results: Results) -> None:
    html = page.render(results)
    text = " ".join(re.sub("<[^>]*>", " ", html.split("<h2>Corpus</h2>")[1].split("<h2>")[0]).split())
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
    assert corpus.drops(entries) == [
        ("records read", ["0", "4"]),
        ("empty", ["–", "25.0%"]),
        ("kept", ["–", "75.0%"]),
    ]


def test_lengths_are_read_as_powers_of_two(finished: Path) -> None:
    Path("data/corpora/demo.lengths.csv").write_text(
        "domain,tokens_from,documents,tokens\ncode,1,2,2\ncode,512,3,1800\n"
    )
    assert results_module.read("demo").lengths == {"code": {0: 2, 9: 3}}
