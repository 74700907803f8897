"""Sums over the counters in a shared folder: of any run, whole or half-written."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tasks.corpus import files
from tasks.corpus.prepare import counters
from tasks.corpus.prepare.counters import Counters, Meter, Snapshot


def meter(folder: Path, *, phase: str = "scan", task: int = 0) -> Meter:
    return Meter(folder, phase=phase, domain="code", task=task)


def snapshot(folder: Path, name: str) -> Snapshot:
    return Snapshot.model_validate_json((folder / name).read_bytes())


counted = st.fixed_dictionaries({name: st.integers(0, 10**12) for name in ("files", "documents", "tokens", "bytes")})
units = st.tuples(st.sampled_from(["scan", "tokenise"]), st.sampled_from(["code", "books"]), counted, st.booleans())


@given(st.lists(units, max_size=8))
def test_counters_add_up_in_each_domain_and_phase(
    tmp_path_factory: pytest.TempPathFactory, made: list[tuple[str, str, dict[str, int], bool]]
) -> None:
    folder = tmp_path_factory.mktemp("meters")
    counters = Counters(folder, 0.0)
    expected: dict[tuple[str, str], Counter[str]] = {}
    for task, (phase, domain, counts, done) in enumerate(made):
        unit = Snapshot(phase=phase, domain=domain, task=task, attempt=str(task), done=done, **counts)  # type: ignore[arg-type]
        (folder / f"{phase}-{domain}-{task:05}.json").write_text(unit.model_dump_json())
        total = expected.setdefault((domain, phase), Counter())
        total.update({"fresh" if key == "bytes" else key: n for key, n in counts.items()} | {"finished": int(done)})
    for now in (1.0, 2.0):  # a second look changes nothing
        counters.poll(now)
        names = ("files", "documents", "tokens", "fresh", "finished")
        assert {key: {n: getattr(sums, n) for n in names} for key, sums in counters.sums.items()} == {
            key: {n: total[n] for n in names} for key, total in expected.items()
        }


def test_what_earlier_runs_did_counts_but_not_in_the_rate(tmp_path: Path) -> None:
    before = meter(tmp_path, task=0)
    before.add(documents=10, bytes=10**9)
    before.close()
    killed = meter(tmp_path, task=1)
    killed.add(documents=5, bytes=10**9)
    killed._write()
    going_on = meter(tmp_path, task=2)  # on another machine, all the while
    going_on.add(documents=1, bytes=1000)
    going_on._write()

    counters = Counters(tmp_path, 100.0)
    assert counters.finished("scan") == 0
    assert counters.largest("code", "documents") == 16
    assert counters.rate("code", "scan") is None
    again = meter(tmp_path, task=1)
    again.add(documents=2, bytes=3000)
    again.close()
    going_on.add(documents=1, bytes=1000)
    going_on.close()
    counters.poll(104.0)
    assert counters.finished("scan") == 2
    assert counters.largest("code", "documents") == 14
    assert counters.rate("code", "scan") == 4000 / 4.0
    counters.poll(200.0)  # the rate is that of the time in which something moved
    assert counters.rate("code", "scan") == 4000 / 4.0


def test_a_finished_unit_that_is_run_again_is_counted_once_and_finishes_twice(tmp_path: Path) -> None:
    counters = Counters(tmp_path, 0.0)
    for now in (1.0, 2.0):
        with meter(tmp_path) as counting:
            counting.add(documents=10, tokens=100, bytes=1000)
            counting.rules["empty"] += 1
        counters.poll(now)
    assert (counters.finished("scan"), counters.largest("code", "documents"), counters.dropped("code")) == (
        2,
        10,
        {"empty": 1},
    )
    assert counters.rate("code") == 1000


def test_the_rate_of_a_run_leaves_out_the_time_between_its_phases(tmp_path: Path) -> None:
    counters = Counters(tmp_path, 0.0)
    for phase, now in (("scan", 2.0), ("tokenise", 50.0)):
        counters.poll(now - 2.0)
        counting = meter(tmp_path, phase=phase)
        counting.add(documents=10, bytes=8000)
        counting.close()
        counters.poll(now)
    assert counters.rate("code", "tokenise") == 4000
    assert counters.rate("code") == 2000  # 8000 bytes of input, each seen in two phases of two seconds


def test_rules_add_up_over_phases_and_what_is_no_drop_is_left_out(tmp_path: Path) -> None:
    for phase, rules in (("scan", {"read": 10, "empty": 2, "bad": 0}), ("tokenise", {"duplicate": 3, "kept": 5})):
        counting = meter(tmp_path, phase=phase)
        counting.add(documents=10)
        counting.rules.update(rules)
        counting.close()
    assert Counters(tmp_path, 0.0).dropped("code") == {"empty": 2, "duplicate": 3}


@pytest.mark.parametrize(
    "content", ["", '{"phase": "scan", "domain": "co', "[]", "null", '{"documents": "many"}', "\0"]
)
def test_a_file_that_is_half_written_is_passed_over_until_it_is_whole(tmp_path: Path, content: str) -> None:
    whole = Snapshot(phase="scan", domain="code", task=0, attempt="a", documents=3).model_dump_json()
    path = tmp_path / "scan-code-00000.json"
    path.write_text(content)
    counters = Counters(tmp_path, 0.0)
    assert counters.sums == {}
    path.write_text(whole)
    counters.poll(1.0)
    assert counters.largest("code", "documents") == 3
    path.write_text(content)
    counters.poll(2.0)
    path.unlink()
    counters.poll(3.0)
    tmp_path.rmdir()
    counters.poll(4.0)
    assert counters.largest("code", "documents") == 3


def test_a_meter_writes_when_it_begins_once_a_second_and_when_it_is_closed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    now, seen = 0.0, []
    monkeypatch.setattr(counters.time, "monotonic", lambda: now)
    counting = meter(tmp_path, task=7)
    seen.append(snapshot(tmp_path, "scan-code-00007.json").documents)
    for quarter in range(1, 10):
        now = quarter / 4
        counting.add(documents=1)
        seen.append(snapshot(tmp_path, "scan-code-00007.json").documents)
    counting.rules["empty"] += 2
    counting.close()
    assert seen == [0, 0, 0, 0, 4, 4, 4, 4, 8, 8]
    last = snapshot(tmp_path, "scan-code-00007.json")
    assert (last.done, last.documents, last.rules) == (True, 9, {"empty": 2})
    assert [path.name for path in tmp_path.iterdir()] == ["scan-code-00007.json"]


def test_what_a_killed_meter_leaves_is_found_by_a_sweep_and_by_no_display(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(counters.os, "replace", killed)
        with pytest.raises(KeyboardInterrupt):
            meter(tmp_path)
    assert len(list(tmp_path.iterdir())) == 1
    assert Counters(tmp_path, 0.0).sums == {}
    files.sweep(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_meter_that_cannot_write_lets_the_work_go_on(tmp_path: Path) -> None:
    counting = meter(tmp_path / "gone")
    for path in (tmp_path / "gone").iterdir():
        path.unlink()
    (tmp_path / "gone").rmdir()
    counting.add(documents=1)
    counting.close()
    assert not (tmp_path / "gone").exists()


def test_a_meter_whose_block_fails_stays_open(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt), meter(tmp_path):
        raise KeyboardInterrupt
    assert not snapshot(tmp_path, "scan-code-00000.json").done
