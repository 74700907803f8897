from __future__ import annotations

import sys
from pathlib import Path

from bench import versions


def test_outcomes_are_counted_by_file_and_a_broken_file_fails(tmp_path: Path) -> None:
    (tmp_path / "test_a.py").write_text(
        "import pytest\ndef test_1(): pass\ndef test_2(): assert 0\n@pytest.mark.skip\ndef test_3(): pass\n"
    )
    (tmp_path / "test_b.py").write_text("import nothing_of_this_name\n")
    outcomes = versions.run(Path(sys.executable), [str(tmp_path)], report=tmp_path / "report.xml")
    counted = {Path(file).name: dict(counts) for file, counts in outcomes.items()}
    assert counted["test_a.py"] == {"passed": 1, "failed": 1, "skipped": 1}
    assert sum(counts.get("failed", 0) for counts in counted.values()) == 2


def test_every_package_that_the_project_asks_for_is_shown_and_every_test_exists() -> None:
    names = versions.requirements(versions.ROOT / "pyproject.toml")
    assert {"torch", "transformers", "deepspeed", "prefect"} <= set(names)
    assert versions.installed(Path(sys.executable), ["torch"]).keys() == {"torch"}
    assert all((versions.ROOT / test).exists() for test in versions.TESTS)
