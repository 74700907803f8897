"""Which documents are held out and which are dropped: duplicates, filtered and contaminated ones."""

from __future__ import annotations

import itertools
import json
import random
from pathlib import Path

import pyarrow as pa

from tasks.corpus import manifest
from tests.corpus.texts import WORDS, Project, jsonl, run, sentences, texts_of


def rules_of(corpus: Path) -> dict[str, dict[str, int]]:
    return {name: domain.rules for name, domain in manifest.load(corpus).domains.items()}


def test_hold_out_does_not_depend_on_the_order_of_documents(project: Project) -> None:
    texts = sentences(1000, seed=3)
    held = []
    for share, order in ((0.1, texts), (0.1, texts[::-1]), (0.2, texts)):
        corpus = project({"prose": order}, heldout=share)
        run()
        held.append({split: set(texts_of(corpus, "prose", split)) for split in ("validation", "test")})
    assert held[0] == held[1]
    for split in ("validation", "test"):
        assert 30 < len(held[0][split]) < 70
        assert held[0][split] < held[2][split]
    assert not held[2]["validation"] & held[2]["test"]


def test_duplicates_go_within_and_across_domains_first_domain_first(project: Project) -> None:
    shared = sentences(40, seed=4)
    variants = [text.replace(" ", "  ").replace("ö", "o\u0308") for text in shared[:10]]  # same words, other bytes
    corpus = project({"zeta": shared + variants + [" \n\t", ""], "alpha": sentences(60, seed=5) + shared})
    run()
    assert rules_of(corpus) == {
        "zeta": {"read": 52, "bad": 0, "empty": 2, "duplicate": 10, "kept": 40},
        "alpha": {"read": 100, "bad": 0, "empty": 0, "duplicate": 40, "kept": 60},
    }


def test_a_document_and_its_near_duplicates_stand_in_one_split_and_the_first_domain_keeps_its_own(
    project: Project, tmp_path: Path
) -> None:
    rng = random.Random(12)
    long = [" ".join(rng.choices(WORDS, k=200)) for _ in range(150)]
    near = [text.replace("the ", "The  ", 1) + " indeed" for text in long]
    alpha = jsonl(tmp_path / "a.jsonl", near + long[:20] + sentences(100, seed=1))
    domains = {"zeta": long, "alpha": {"source": alpha, "heldout": 0.5}}

    def splits_of_each(corpus: Path) -> dict[str, set[str]]:
        """The original of each long document -> the splits in which it or its near-duplicate stands."""
        splits: dict[str, set[str]] = {text: set() for text in long}
        for domain, split in itertools.product(domains, manifest.SPLITS):
            for text in texts_of(corpus, domain, split):
                original = text.removesuffix(" indeed").replace("The  ", "the ", 1)
                splits.get(original, set()).add(split)
        return splits

    for action in ("drop", "group"):
        corpus = project(domains, near_duplicates={"action": action})
        run()
        rules = rules_of(corpus)
        assert rules["zeta"]["near_duplicate"] == 0
        assert rules["alpha"]["near_duplicate"] == (150 if action == "drop" else 0)
        assert rules["alpha"]["duplicate"] == 20
        homes = splits_of_each(corpus)
        assert all(len(splits) == 1 for splits in homes.values())
        assert {split for splits in homes.values() for split in splits} == set(manifest.SPLITS)
    corpus = project(domains)  # not looked for: they stand on both sides
    run()
    assert any(len(splits) > 1 for splits in splits_of_each(corpus).values())


def test_problems_and_tables_that_differ_in_their_numbers_stay_unless_a_domain_says_otherwise(
    project: Project, tmp_path: Path
) -> None:
    problems = [f"Question {n}: what is {7 * n} plus {n * n}? Answer: {7 * n + n * n}." for n in range(100)]
    rng = random.Random(3)
    tables = ["\n".join(f"Item {row}: {rng.randint(100, 999)} EUR" for row in range(30)) for _ in range(100)]
    same = [" ".join(rng.choices(WORDS, k=60)) for _ in range(60)]
    doubled = [*same, *(f"{text} again" for text in same)]
    dates = jsonl(tmp_path / "d.jsonl", [f"{text} x" for text in tables] + sentences(60, seed=4))
    left = jsonl(tmp_path / "l.jsonl", [text.upper() + " !" for text in doubled])
    domains = {
        "problems": problems,
        "tables": tables,
        "dates": {"source": dates, "near_duplicates": {"digits": False}},
        "doubled": [f"{text} once" for text in doubled],
        "left": {"source": left, "near_duplicates": "none"},
    }
    corpus = project(domains, near_duplicates={})
    run()
    dropped = {name: rules["near_duplicate"] for name, rules in rules_of(corpus).items()}
    assert dropped == {"problems": 0, "tables": 0, "dates": 99, "doubled": 60, "left": 0}


def test_what_was_dropped_is_counted_by_rule_and_listed_with_its_place(project: Project, tmp_path: Path) -> None:
    item = "how many of the quick brown wizards does it take to brew one pot of strong tea"
    source = jsonl(tmp_path / "a.jsonl", [*sentences(100, seed=13), "tiny", f"they asked {item} today"])
    with (tmp_path / "a.jsonl").open("a") as file:
        file.write("{\n" * 150)
    corpus = project(
        {"a": {"source": source}},
        max_bad=0.7,
        task_bytes=2000,
        filters=[{"rule": "length", "min_chars": 10}],
        keep_rejects=True,
        decontaminate={"items": [{"name": "quiz", "source": jsonl(tmp_path / "items.jsonl", [item])}]},
    )
    metrics = run()
    dropped = {"read": 252, "bad": 150, "length.too_short": 1, "contaminated": 1}
    assert rules_of(corpus)["a"] == {**dropped, "empty": 0, "duplicate": 0, "kept": 100}
    assert metrics["domains"]["a"]["bad"]["invalid JSON"].startswith("150, the first in a.jsonl, row 102")
    listed = [json.loads(line) for path in sorted(corpus.glob("rejects/a/*")) for line in path.open()]
    assert {"rule": "length.too_short", "source": "a.jsonl", "row": 100, "text": "tiny"} in listed
    hit = next(entry for entry in listed if entry["rule"] == "contaminated")
    assert hit["row"] == 101
    assert hit["detail"].startswith("quiz:0: ")
    bad = [entry for entry in listed if entry["rule"] == "invalid JSON"]
    assert [entry["row"] for entry in bad] == list(range(102, 102 + len(bad)))
    tables = (pa.ipc.open_file(path).read_all() for path in sorted(corpus.glob("verdicts/a/*")))
    verdicts = [verdict for table in tables for verdict in table["verdict"].to_pylist()]
    assert len(verdicts) == 252
    assert verdicts[100:103] == ["length.too_short", "contaminated", "bad: invalid JSON"]
    assert verdicts.count("train") == manifest.load(corpus).domains["a"].train.documents
