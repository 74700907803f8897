"""The page's answer, its frontier, an elastic model's settings and the cost of training, from made-up results."""

from __future__ import annotations

import html
import json
import re
from pathlib import Path
from typing import Any

import pytest

from tasks.evaluate import answer, summary
from tasks.evaluate.report import card, cost_section, elastic_section, frontier_section, page
from tasks.evaluate.report import results as results_module
from tasks.evaluate.report.results import Results
from tests.finished_run import write_child


@pytest.fixture
def rivals(finished: Path) -> Results:
    """The results of a pipeline that has a dense child."""
    write_child(finished)
    return results_module.read("demo")


def shown(results: Results) -> str:
    """The text of the page."""
    return " ".join(html.unescape(re.sub("<[^>]*>", " ", page.render(results))).split())


def copied(evaluation: dict[str, Any]) -> dict[str, Any]:
    content: dict[str, Any] = json.loads(json.dumps(evaluation))
    return content


def test_page_and_card_begin_with_who_is_better_by_how_much_and_at_which_speed(rivals: Results) -> None:
    said = answer.sentences(rivals.evaluation)
    assert said == [
        summary.rival(rivals.evaluation),
        "In llama.cpp Q8_0, 2 threads, it decodes at 24 tokens/s, 1.20 × the parent's speed (1.20 to 1.20 by repeat) "
        "and 0.96 × the child's, and reads a prompt at 480 tokens/s, 1.20 × the parent's speed (1.20 to 1.20 by "
        "repeat) and 0.80 × the child's.",
        "It has 136.2 M parameters in all, 1.39 × the dense child's.",
        "Of 1 downstream task, against the dense child on the same items and by intervals of 95%, it is better in "
        "hellaswag_100.",
    ]
    seen, text = shown(rivals), card.text(rivals)
    order = [seen.index(part) for part in (*said, "The frontier", "Bits per byte after training", "Samples")]
    assert order == sorted(order)
    before = text[: text.index("## Evaluation")]
    assert all(f"- {sentence}\n" in before for sentence in said)
    assert text.count(said[0]) == 1
    assert "| | after training | dense child | dense parent |" in before
    assert "| active / all parameters | 106.3 M / 136.2 M | 98.0 M / 98.0 M | 134.5 M / 134.5 M |" in before


def test_a_task_counts_only_where_its_interval_on_the_same_items_leaves_out_0(rivals: Results) -> None:
    evaluation = copied(rivals.evaluation)
    tasks, paired = evaluation["trained"]["tasks"], evaluation["paired"]["tasks"]
    for name, low, high in (("one", 0.01, 0.1), ("two", -0.1, -0.01), ("three", -0.1, 0.1)):
        tasks[name] = tasks["hellaswag_100"] | {"acc_norm": 0.26 if name == "three" else 0.5}
        found = {"difference": (low + high) / 2, "low": low, "high": high}
        paired[name] = {"acc_norm": {"trained_child": found}, "acc": {"trained_child": found | {"low": -1, "high": 1}}}
    said = answer.tasks(evaluation)
    assert said.startswith(
        "Of 4 downstream tasks, against the dense child on the same items and by intervals of 95%, "
    )
    assert re.search(r"it is better in (\w+, )?one and worse in (\w+, )?two\.", said)
    assert said.endswith("Its score may be a guess in three.")
    evaluation["paired"]["tasks"] = {}
    assert answer.tasks(evaluation) == ""


def test_text_that_no_stage_has_read_has_a_verdict_of_its_own(rivals: Results) -> None:
    evaluation = copied(rivals.evaluation)
    assert answer.unseen(evaluation) == ""
    evaluation["test"]["unseen"] = {"manuals": {}, "sonnets": {}}
    evaluation["difference"]["unseen"] = {"trained_child": {"loss": 0.1, "stderr": 0.06}}
    assert answer.sentences(evaluation)[2] == (
        "On text of domains that no stage has read (manuals, sonnets), neither is better by two standard errors: mean "
        "loss +0.100 ± 0.060 nats/token compared with the dense child."
    )


def test_without_a_child_the_answer_is_against_the_parent_and_says_what_is_missing(results: Results) -> None:
    said = answer.sentences(results.evaluation)
    assert said[0] == (
        "There is no dense model of the same active size to compare with (`control: pruned` makes one). Against "
        "the dense parent, with 134.5 M active parameters where it has 106.3 M, the dense parent is better: mean loss "
        "+0.490 ± 0.000 nats/token, paired by window."
    )
    assert "dense child" not in " ".join(said)
    evaluation = copied(results.evaluation)
    del evaluation["speed"], evaluation["difference"]["trained_dense"]
    assert [sentence.split()[0] for sentence in answer.sentences(evaluation)] == ["It", "Of"]
    evaluation["dense_trained"] = evaluation["dense"]
    assert answer.table(evaluation)[0] == ["after training", "dense parent", "parent trained alike"]
    del evaluation["dense_trained"]
    columns, rows = answer.table(evaluation)
    assert columns == ["after training", "dense parent"]
    assert len(rows) == 4


def test_the_frontier_has_every_model_by_measured_speed_and_by_flops(rivals: Results) -> None:
    by_speed, by_flops = frontier_section.section(rivals).figures
    titles = summary.titles(rivals.evaluation)
    for figure in (by_speed, by_flops):
        assert re.findall(r"<title>([^:]*): ", figure.chart) == titles
    assert "after the split: 24.0, " in by_speed.chart  # the speed of the trained model, which has its shape
    assert "forward FLOPs per token, M" in by_flops.chart
    assert "dense parent: 303.0, " in by_flops.chart
    evaluation = copied(rivals.evaluation)
    del evaluation["speed"]
    alone = frontier_section.section(Results(**{**vars(rivals), "evaluation": evaluation}))
    assert [figure.title for figure in alone.figures] == ["Quality and FLOPs"]


def test_an_elastic_model_has_a_point_and_a_row_for_each_setting(rivals: Results) -> None:
    assert elastic_section.section(rivals) is None
    evaluation = copied(rivals.evaluation)
    trained = evaluation["trained"]
    same = {key: trained[key] for key in ("loss", "perplexity", "bits_per_byte", "flops_per_token")}
    trained["elastic"] = {
        "16": same | {"perplexity": {"mean": 50.0}, "active": 100_000_000, "flops_per_token": 200_000_000},
        "32": same | {"active": 106_315_008},
    }
    for row in evaluation["speed"]["engines"]:
        figures = row["models"]["trained"]
        row["elastic"] = {"16": {"trained": figures | {"decode": {"median": 30.0}, "ratio": {
            "prompt": {"median": 1.3}, "decode": {"median": 1.5}}}}}  # fmt: skip
    contents = Results(**{**vars(rivals), "evaluation": evaluation})
    made = elastic_section.section(contents)
    assert made is not None
    (table,) = made.tables
    (group,) = table.groups
    assert [label for label, _ in group["rows"]] == ["top_k 16", "top_k 32 (as it loads)"]
    low, usual = (cells for _, cells in group["rows"])
    assert low[:2] == ["100.0 M", "200.0 M"]
    assert low[-1] == "30 (1.50 ×)"
    assert usual[-1] == "24 (1.20 ×)"
    assert len(low) == len(usual) == len(table.columns)
    by_speed, by_flops = frontier_section.section(contents).figures
    assert "after training, top_k 16: 30.0, 50.00" in by_speed.chart
    assert "after training, top_k 16: 200.0, 50.00" in by_flops.chart
    assert "One model at several speeds" in page.render(contents)


def test_the_cost_of_training_is_drawn_three_ways_with_the_factor_and_its_range(rivals: Results) -> None:
    made = cost_section.section(rivals)
    assert made is not None
    assert [figure.title for figure in made.figures] == [
        "Loss by FLOPs of training", "Loss by time of training", "Loss by tokens",
    ]  # fmt: skip
    for figure in made.figures:
        assert re.findall(r"<title>([^<]*)</title>", figure.chart) == ["Mixture-of-Experts", "dense child"]
    rows = dict(made.tables[0].groups[0]["rows"])
    tokens, flops, seconds = (float(rows[by][0].split()[0]) for by in ("tokens", "flops", "seconds"))
    assert tokens > 1  # it needs fewer tokens, each of which costs 7 / 6 of the FLOPs and twice the time
    assert flops == pytest.approx(tokens * 6 / 7, abs=0.01)
    assert seconds == pytest.approx(tokens / 2, abs=0.01)
    assert rows["tokens"][3].endswith("(all evaluations)")
    assert "206 s and 100 s" in made.notes[0]
    text = shown(rivals)
    assert "nothing is extrapolated" in text


def test_a_parent_that_was_trained_alike_is_a_third_curve_with_factors_of_its_own(rivals: Results) -> None:
    curve = dict(rivals.control["curve"])
    curve["loss"] = [loss - 0.01 for loss in curve["loss"]]
    control = rivals.control | {"parent": {"curve": curve}}
    made = cost_section.section(Results(**{**vars(rivals), "control": control}))
    assert made is not None
    for figure in made.figures:
        assert "<title>parent trained alike</title>" in figure.chart
    assert [group["title"] for group in made.tables[0].groups] == [
        "against the dense child", "against the parent trained alike",
    ]  # fmt: skip


def test_runs_that_share_no_loss_get_the_curves_and_the_reason(rivals: Results) -> None:
    curve = dict(rivals.pretrain["curve"])
    curve["loss"] = [loss - 0.5 for loss in curve["loss"]]
    made = cost_section.section(Results(**{**vars(rivals), "pretrain": rivals.pretrain | {"curve": curve}}))
    assert made is not None
    assert len(made.figures) == 3
    (reason,) = [note for note in made.notes if note.startswith("No speed-up factor: ")]
    assert "dense child ends at 3.230, and Mixture-of-Experts is below that already before training" in reason
    assert dict(made.tables[0].groups[0]["rows"])["flops"][:3] == ["–"] * 3
    without = {key: value for key, value in rivals.pretrain.items() if key != "curve"}
    assert cost_section.section(Results(**{**vars(rivals), "pretrain": without})) is None
