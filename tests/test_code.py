"""Digests of code follow what a stage imports and does, and nothing else."""

from __future__ import annotations

import ast
import json
from pathlib import Path

import pytest
from ruamel.yaml import YAML

from tasks import code
from tests import warm_processes

ROOT = Path(__file__).parent.parent
PROJECT = code.Project({"tasks": ROOT / "tasks", "moe_kernels": ROOT / "kernels/moe_kernels"})
ENTRIES = [
    entry["do"]["cmd"].split()[2]
    for entry in YAML(typ="safe", pure=True).load((ROOT / "dvc.yaml").read_text())["stages"].values()
    if "tasks.code " not in entry["do"]["cmd"]
]
FILES = sorted(PROJECT.modules.items())


def digest(text: str) -> str:
    return code.read(text, "tasks.some", path="tasks/some.py").digest


def test_a_comment_a_docstring_or_a_hint_changes_no_digest_and_a_constant_does() -> None:
    """Of every file of the project."""
    for module, path in FILES:
        text = path.read_text()
        before = PROJECT.source(module)
        assert code.read(f"# a remark\n{reworded(text)}", module, path=str(path)) == before, path
        assert code.read(f"{text}\nOF_A_TEST = 1\n", module, path=str(path)).digest != before.digest, path


def reworded(text: str) -> str:
    """Other docstrings, and other hints where nothing reads them, with the import that they need."""
    tree = ast.parse(text)
    hint = ast.parse("Unusual[int]", mode="eval").body
    fields = {
        id(statement)
        for node in ast.walk(tree)
        if isinstance(node, ast.ClassDef) and (node.bases or node.keywords or node.decorator_list)
        for statement in node.body
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str):
            node.value.value += " In other words."
        elif isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            node.body.insert(0, ast.Expr(ast.Constant("Documented.")))
            if not node.decorator_list:
                node.returns = hint
                for argument in (*node.args.args, *node.args.kwonlyargs):
                    argument.annotation = hint
        elif isinstance(node, ast.AnnAssign) and id(node) not in fields:
            node.annotation = hint
    at = 1 + max((i for i, node in enumerate(tree.body) if is_future(node)), default=-1)
    tree.body.insert(at, ast.parse("from collections.abc import Hashable as Unusual").body[0])
    return ast.unparse(tree)


def is_future(node: ast.stmt) -> bool:
    return isinstance(node, ast.Expr) or (isinstance(node, ast.ImportFrom) and node.module == "__future__")


def test_only_stages_that_import_a_module_have_its_digest() -> None:
    """Every file that stages have changes exactly those that import it; tools have a part in none."""
    parts = {entry: PROJECT.digests(entry) for entry in ENTRIES}
    assert not [module for entry in ENTRIES for module in parts[entry] if module.startswith(("tasks.tools", "bench"))]
    assert "tasks.pretrain.launch.worker" in parts["tasks.pretrain"]  # named by a string
    assert "tasks.partition.methods.random" in parts["tasks.partition"]  # reached by an f-string
    assert "moe_kernels/tiles.json" in parts["tasks.pretrain"]
    harness = "tasks/evaluate/downstream/harness"
    assert {f"{harness}/hellaswag_100.yaml"} <= parts["tasks.evaluate"].keys()
    loaded = {f"{harness}/{name}".replace("/", ".") for name in ("analogies", "hellaswag", "inference")}
    assert loaded <= parts["tasks.evaluate"].keys()  # by lm-eval, for a `!function` of its YAML files
    assert any(name.endswith("report.html.j2") for name in parts["tasks.evaluate.report"])
    assert not any(name.startswith("moe_kernels") for name in parts["tasks.moe.dense"])
    assert "tasks.plugins.analysis.figures" in parts["tasks.evaluate"]  # by the seams that it names
    assert {name.rsplit(".")[-1] for name in parts["tasks.corpus"] if name.count(".") == 3 and "plugins" in name} == {
        "settings"
    }


@pytest.mark.parametrize("entry", ["tasks.moe.dense", "tasks.corpus", "tasks.partition", "tasks.evaluate.report"])
def test_what_a_process_imports_is_in_the_closure(entry: str) -> None:
    main = f"{entry}.__main__" if f"{entry}.__main__" in PROJECT.modules else entry
    done = warm_processes.run(warm_processes.print_imports, main, code.PACKAGES)
    assert done.returncode == 0, done.stderr
    imported = set(json.loads(done.stdout.splitlines()[-1]))
    assert main in imported
    closure = PROJECT.closure(entry)
    assert imported <= closure
    # What is left is imported inside functions.
    late = {name for module in imported for name in PROJECT.imports(module)} - imported
    reached = set(late)
    while late:
        late = {name for module in late for name in PROJECT.imports(module)} - reached - imported
        reached |= late
    assert closure == imported | reached


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ("import torch\n\n\ndef f(x: int) -> int:\n    return x\n", "import torch\n\n\ndef f(x):\n    return x\n"),
        ("X: int = 3\n", "X = 3\n"),
        ("class A:\n    x: int\n", "class A:\n    x: str\n"),
        ("def f():\n    '''Doc.'''\n", "def f():\n    pass\n"),
        ("if TYPE_CHECKING:\n    import torch\nX = 1\n", "X = 1\n"),
        ("from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import a\nelse:\n    b = 1\n", "b = 1\n"),
        ("import math\nimport re\nX = re.A + math.e\n", "import re\nimport math\nX = re.A + math.e\n"),
        ("@functools.lru_cache(maxsize=2)\ndef f(x: int): ...\n", "@functools.lru_cache(maxsize=2)\ndef f(x): ...\n"),
        ("X = ( 'a' 'b', )\n", 'X = ("ab",)\n'),
        ("def f(*a: int, **k: str): ...\n", "def f(*a, **k): ...\n"),
    ],
)  # fmt: skip
def test_these_do_the_same(before: str, after: str) -> None:
    assert digest(before) == digest(after)


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ("@dataclass\nclass A:\n    x: int\n", "@dataclass\nclass A:\n    x: str\n"),
        ("class A(Frozen):\n    x: int = 1\n", "class A(Frozen):\n    x: Positive = 1\n"),
        ("@triton.jit\ndef k(B: tl.constexpr): ...\n", "@triton.jit\ndef k(B): ...\n"),
        ("from math import sqrt\nX = sqrt(2)\n", "from cmath import sqrt\nX = sqrt(2)\n"),
        ("from torch import a\n", "from torch import b\n"),
        ("import torch\n", ""),
        ("from math import sqrt as f\nX = f(2)\n", "from math import cbrt as f\nX = f(2)\n"),
        ("X = True\n", "X = 1\n"),
        ("X = 1.0\n", "X = 1\n"),
        ("X = None\n", "X = ()\n"),
        ("def f(a, b=1): ...\n", "def f(a=1, b=1): ...\n"),
        ("X = f'{a!r:>4}'\n", "X = f'{a!s:>4}'\n"),
        ("if a:\n    b()\n", "if a:\n    pass\nb()\n"),
        ("@cache\ndef f(): ...\n", "def f(): ...\n"),
        ("x = [a, [b]]\n", "x = [a, b]\n"),
        ("return_ = 1\ndel x\n", "return_ = 1\nx\n"),
    ],
)  # fmt: skip
def test_these_do_something_else(before: str, after: str) -> None:
    assert digest(before) != digest(after)


def test_imports_are_followed_wherever_they_stand(tmp_path: Path) -> None:
    files = {
        "p/__init__.py": "",
        "p/a/__init__.py": "from . import inner",
        "p/a/inner.py": "",
        "p/a/main.py": "def f():\n    from ..b import two\n    from p.c import name\n\n\nRUN = ['-m', 'p.d.worker']",
        "p/b/__init__.py": "",
        "p/b/two.py": "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import p.unused",
        "p/c.py": "name = 1\nTEMPLATE = 'page.txt'\nFOLDER = 'tables'",
        "p/page.txt": "text",
        "p/other.txt": "text",
        "p/tables/one.csv": "1",
        "p/tables/__init__.py": "",
        "p/tables/shape.py": "from p import f",
        "p/f/__init__.py": "",
        "p/d/__init__.py": "",
        "p/d/worker.py": "import_module(f'p.e.{name}')",
        "p/e/__init__.py": "",
        "p/e/first.py": "",
        "p/e/second.py": "",
        "p/unused.py": "",
    }
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    digests = code.Project({"p": tmp_path / "p"}).digests("p.a.main")
    modules = ["p", "p.a", "p.a.inner", "p.a.main", "p.b", "p.b.two", "p.c", "p.d", "p.d.worker"]
    modules += ["p.e", "p.e.first", "p.e.second", "p.f", "p.tables", "p.tables.shape"]
    assert sorted(digests) == sorted([*modules, "p/page.txt", "p/tables/one.csv"])


def test_a_module_that_is_not_there_or_not_python_is_a_clear_error(tmp_path: Path) -> None:
    (tmp_path / "p").mkdir()
    (tmp_path / "p/__init__.py").write_text("x = (\n")
    project = code.Project({"p": tmp_path / "p"})
    with pytest.raises(code.CodeError, match=r"p/__init__\.py:1: '\(' was never closed"):
        project.digests("p")
    with pytest.raises(code.CodeError, match=r"p\.q: no such module"):
        project.digests("p.q")


def test_the_fingerprint_is_that_of_the_installed_sources_in_any_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    here = code.fingerprint("tasks.moe.dense")
    monkeypatch.chdir(tmp_path)
    assert code.fingerprint("tasks.moe.dense") == here
