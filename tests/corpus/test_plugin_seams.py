"""A plug-in of one file adds a filter, and one of one file a format, to settings and to the corpus stage."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from tests.conftest import ROOT

FILTER = """
from collections.abc import Callable
from typing import Literal

from tasks.settings.fields import Frozen, Share


class Rule(Frozen):
    rule: Literal["digits"]
    max_share: Share = 0.2


def make_filter(rule: Rule) -> Callable[[str], str | None]:
    return lambda text: "too_many" if sum(map(str.isdigit, text)) > rule.max_share * len(text) else None
"""
READER = """
from tasks.corpus.readers.base import FileReader
from tasks.corpus.records import Document


class Reader(FileReader):
    def records(self, file, piece):
        for row, text in enumerate(file.read().decode().split("---")):
            yield Document(text=text.strip(), source=piece.path, row=row)
        return row + 1
"""
USE = """
import sys
from pathlib import Path
from types import ModuleType

from tasks import plugin

plugin.FOLDER = Path("plugins")
sys.modules["tasks.plugins"] = ModuleType("tasks.plugins")
sys.modules["tasks.plugins"].__path__ = ["plugins"]
from tasks.corpus.filters import chain
from tasks.corpus.readers.registry import open_reader
from tasks.corpus.records import Document
from tasks.settings import Domain

domain = Domain(source="dir:notes.txt", format="rules", license="own", filters=[{"rule": "digits", "max_share": 0.5}])
drop = chain.build(domain.filters)
reader = open_reader(domain, Path("cache"), max_record_bytes=1000)
texts = [each.text for (task,) in [reader.tasks(task_bytes=1000)] for piece in task for each in reader.read(piece)]
print(texts, [drop(Document(text=text, source="s", row=0)) for text in texts])
"""


def test_a_plugin_adds_a_filter_and_a_format(tmp_path: Path) -> None:
    for name, seam, code in (("digits", "filter", FILTER), ("rules", "reader", READER)):
        folder = tmp_path / "plugins" / name
        folder.mkdir(parents=True)
        (folder / "__init__.py").write_text(f'"""{name}."""\n')
        (folder / f"{seam}.py").write_text(code)
    (tmp_path / "notes.txt").write_text("two words --- 12345 6")
    (tmp_path / "use.py").write_text(USE)
    done = subprocess.run(
        [sys.executable, "use.py"],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "kernels")])},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == "['two words', '12345 6'] [None, 'digits.too_many']\n"
