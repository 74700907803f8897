"""The code that a stage's process imports, and digests of it that only a change of behaviour changes.

    python -m tasks.code FOLDER MODULE ...      # write FOLDER/MODULE.json, {module or data file: digest}, for each

A stage of dvc.yaml depends on the file of its module instead of on source folders. So DVC runs a stage again if the
code that it imports changed, and does not if a docstring, a comment, a type hint or any other file did.

A module imports what its import statements name, at module level and inside functions, but not under TYPE_CHECKING;
the packages of those modules; each module that a string names ("tasks.pretrain.launch.worker"); all modules of a
package that an f-string reaches into (f"tasks.partition.methods.{name}"); and each data file or folder beside it that
a string names ("report.html.j2"), a folder with its modules. Who imports the registry of plug-ins imports the modules
of the seams that it names (`plugin.modules("figures")`). Only packages of this project are followed.
"""

from __future__ import annotations

import argparse
import ast
import functools
import hashlib
import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import util
from pathlib import Path
from typing import Any

PACKAGES = ("tasks", "moe_kernels")
REGISTRY = "tasks.plugin"
"""Its plug-ins are the packages in tasks.plugins."""
THIS = "tasks.code"
"""Left out of every digest: what this file does shows in the digests themselves."""
HARMLESS = {
    "abstractmethod", "cache", "cached_property", "classmethod", "contextmanager", "enable_grad", "estimator",
    "inference_mode", "lru_cache", "method", "model_validator", "no_grad", "override", "property", "setter",
    "staticmethod", "wraps",
}  # fmt: skip
"""Decorators that do not read a function's annotations. Others may, as triton.jit does, so annotations count there."""


class CodeError(ValueError):
    """A module cannot be found or parsed; the message names the file, the line and the fault."""


def fingerprint(entry: str) -> str:
    """16 hex digits of all code that a process of module `entry` imports. Raises CodeError."""
    return hashlib.sha256(content(entry).encode()).hexdigest()[:16]


def content(entry: str) -> str:
    """The file on which a stage depends whose command is `python -m entry`, as JSON. Raises CodeError."""
    project = Project({name: locate(name) for name in (*PACKAGES, entry.partition(".")[0])})
    return json.dumps(project.digests(entry), indent=1, sort_keys=True) + "\n"


def locate(package: str) -> Path:
    """The folder of a package as `python -m` finds it: in the current folder, else where it is installed.

    Raises CodeError: it is in neither.
    """
    if Path(package, "__init__.py").is_file():
        return Path(package)
    spec = util.find_spec(package)
    if spec is None or spec.origin is None:
        raise CodeError(f"{package}: not in this folder and not installed; `make setup` installs it")
    return Path(spec.origin).parent


class Project:
    """The modules and data files of `packages`, {name of a top-level package: its folder}."""

    def __init__(self, packages: dict[str, Path]) -> None:
        self.modules: dict[str, Path] = {}
        self._folders: dict[str, str] = {}  # package/… of each module
        self._data: dict[str, list[Path]] = {}
        for package, root in packages.items():
            for path in sorted(root.rglob("*")):
                if path.suffix == ".pyc" or path.is_dir():
                    continue
                parts = (package, *path.relative_to(root).parts)
                if path.suffix == ".py":
                    name = ".".join((*parts[:-1], path.stem)).removesuffix(".__init__")
                    self.modules[name], self._folders[name] = path, "/".join(parts[:-1])
                    continue
                for n in range(2, len(parts) + 1):  # the file by its name, and by that of each folder above it
                    self._data.setdefault("/".join(parts[:n]), []).append(path)

    def imports(self, module: str) -> set[str]:
        """The modules that a module imports itself, with their packages, and its own."""
        source = self.source(module)
        dotted = {string for string in source.strings if "." in string}  # "moe_kernels" also names an implementation
        base = self._folders[module]
        inside = [f"{base}/{each}/".replace("/", ".") for each in source.strings if f"{base}/{each}" in self._data]
        inside += [string for string in dotted if string.endswith(".")]
        if module == REGISTRY:  # it reaches all plug-ins, and its callers the seams that they name
            inside = []
        names = {*source.imports, *dotted, module, *(n for n in self.modules if n.startswith(tuple(inside)))}
        names |= {n for n in self.modules if n.startswith(f"{REGISTRY}s.") and n.split(".", 3)[-1] in source.seams}
        parents = {name.rsplit(".", n)[0] for name in names for n in range(name.count(".") + 1)}
        return {name for name in parents if name in self.modules} - {module}

    def data(self, module: str) -> dict[str, Path]:
        """{package/…/name: path} of the data files that a module's strings name."""
        base, strings = self._folders[module], self.source(module).strings
        if module == REGISTRY:
            return {}
        files = {path for string in strings for path in self._data.get(f"{base}/{string}", ())}
        return {f"{base}/{path.relative_to(self.modules[module].parent).as_posix()}": path for path in files}

    def closure(self, entry: str) -> set[str]:
        """All modules that a process of `python -m entry` imports. Raises CodeError: there is no such module."""
        main = f"{entry}.__main__" if f"{entry}.__main__" in self.modules else entry
        if main not in self.modules:
            packages = sorted({module.partition(".")[0] for module in self.modules})
            raise CodeError(f"{entry}: no such module in {', '.join(packages)}")
        done, todo = set[str](), {main}
        while todo:
            done.add(module := todo.pop())
            todo |= self.imports(module) - done
        return done

    def digests(self, entry: str) -> dict[str, str]:
        """{module or data file: 16 hex digits} of the code of `python -m entry`. Raises CodeError."""
        result = {}
        for module in self.closure(entry) - {THIS}:
            result[module] = self.source(module).digest
            for name, path in self.data(module).items():
                result[name] = hashlib.sha256(path.read_bytes()).hexdigest()[:16]
        return result

    def source(self, module: str) -> Source:
        """What is known of one module. Raises CodeError: it is not Python."""
        path = self.modules[module]
        stat = path.stat()
        return _read(str(path), module, stat.st_mtime_ns, stat.st_size)


@dataclass(frozen=True, kw_only=True)
class Source:
    """`imports`: names of modules, or of what is in them, but the standard library's; `typing`: those imported under
    TYPE_CHECKING; `strings`: those that may name a module or a file; `seams`: those of plug-ins that it asks for;
    `digest`: 16 hex digits of what the code does."""

    imports: frozenset[str]
    typing: frozenset[str]
    strings: frozenset[str]
    seams: frozenset[str]
    digest: str


@functools.lru_cache(maxsize=2048)
def _read(path: str, module: str, _mtime: int, _size: int) -> Source:
    return read(Path(path).read_text(), module, path=path)


def read(text: str, module: str, *, path: str) -> Source:
    """What a module's text imports, names and does. Raises CodeError naming `path`: it is not Python."""
    package = module if Path(path).name == "__init__.py" else module.rpartition(".")[0]
    try:
        tree = ast.parse(text)
    except SyntaxError as error:
        raise CodeError(f"{path}:{error.lineno}: {error.msg}; correct it, then run again") from None
    writer = _Writer(package)
    writer.write(tree)
    return Source(
        imports=frozenset(writer.imports),
        typing=frozenset(writer.typing),
        strings=frozenset(string for string in writer.strings if 1 < len(string) < 100),
        seams=frozenset(writer.seams),
        digest=hashlib.sha256("".join(writer.lines()).encode()).hexdigest()[:16],
    )


class _Writer:
    """Writes a syntax tree without docstrings, hints and what serves hints alone.

    The form is one that no version of Python changes, which `ast.dump` and `ast.unparse` do not promise.
    """

    def __init__(self, package: str) -> None:
        self.package = package
        self.imports: set[str] = set()
        self.typing: set[str] = set()
        self.strings: set[str] = set()
        self.seams: set[str] = set()
        self._out: list[str] = []
        self._library: list[tuple[str, str]] = []
        self._names: set[str] = set()
        self._fields = False
        self._annotated = False

    def lines(self) -> Iterator[str]:
        """What was written. Imports from the standard library come last, but for names that only hints use."""
        yield from self._out
        yield from sorted({line for name, line in self._library if name in self._names})

    def write(self, value: Any) -> None:
        """Write a node, a list of nodes or a constant."""
        if isinstance(value, ast.AST):
            special = getattr(self, f"_{type(value).__name__}", None)
            (special or self._generic)(value)
        elif isinstance(value, list):
            self._out.append("[")
            for item in value:
                self.write(item)
            self._out.append("]")
        else:
            self._out.append(f"{value!r},")

    def _generic(self, node: ast.AST, *, skip: str = "") -> None:
        self._out.append(f"{type(node).__name__}(")
        for name in node._fields:
            value = getattr(node, name, None)
            if value is not None and value != [] and name not in ("ctx", "kind", "type_comment", skip):
                self._out.append(f"{name}=")
                self.write(value)
        self._out.append(")")

    def _Name(self, node: ast.Name) -> None:
        self._names.add(node.id)
        self._out.append(f"Name({node.id})")

    def _Constant(self, node: ast.Constant) -> None:
        if isinstance(node.value, str):
            self.strings.add(node.value)
        self._out.append(f"Constant({node.value!r})")

    def _Call(self, node: ast.Call) -> None:
        if "modules" in (getattr(node.func, "id", ""), getattr(node.func, "attr", "")) and node.args:
            seam = getattr(node.args[0], "value", None)
            self.seams |= {seam} if isinstance(seam, str) else set()
        self._generic(node)

    def _Expr(self, node: ast.Expr) -> None:
        if not isinstance(node.value, ast.Constant):  # a docstring, or ...
            self._generic(node)

    def _Pass(self, node: ast.Pass) -> None:
        pass

    def _If(self, node: ast.If) -> None:
        if "TYPE_CHECKING" in (getattr(node.test, "id", ""), getattr(node.test, "attr", "")):
            inner = _Writer(self.package)
            inner.write(node.body)
            self.typing |= inner.imports
            for statement in node.orelse:
                self.write(statement)
        else:
            self._generic(node)

    def _AnnAssign(self, node: ast.AnnAssign) -> None:
        if self._fields:
            self._generic(node)
        elif node.value is not None:  # as if it had no hint
            self._generic(ast.Assign(targets=[node.target], value=node.value))

    def _arg(self, node: ast.arg) -> None:
        self._generic(node, skip="" if self._annotated else "annotation")

    def _ClassDef(self, node: ast.ClassDef) -> None:
        before = self._fields, self._annotated
        self._fields = bool(node.bases or node.keywords or node.decorator_list)  # pydantic and dataclasses read them
        self._generic(node)
        self._fields, self._annotated = before

    def _FunctionDef(self, node: ast.FunctionDef | ast.AsyncFunctionDef) -> None:
        before = self._fields, self._annotated
        self._fields, self._annotated = False, not all(_last(each) in HARMLESS for each in node.decorator_list)
        self._generic(node, skip="" if self._annotated else "returns")
        self._fields, self._annotated = before

    _AsyncFunctionDef = _FunctionDef

    def _Import(self, node: ast.Import) -> None:
        for alias in node.names:
            self._alias({alias.name}, f"import {alias.name}", alias, bound=alias.name.partition(".")[0])

    def _ImportFrom(self, node: ast.ImportFrom) -> None:
        above = self.package.split(".")[: -(node.level - 1) or None] if node.level else []
        module = ".".join([*above, *([node.module] if node.module else [])])
        for alias in node.names:
            names = {module, f"{module}.{alias.name}"}
            self._alias(names, f"from {module} import {alias.name}", alias, bound=alias.name)

    def _alias(self, names: set[str], line: str, alias: ast.alias, *, bound: str) -> None:
        line += f" as {alias.asname};" if alias.asname else ";"
        if min(names).partition(".")[0] in sys.stdlib_module_names:
            self._library.append((alias.asname or bound, line))
        else:
            self.imports |= names
            self._out.append(line)


def _last(decorator: ast.expr) -> str:
    """The last name of a decorator: `lru_cache` of @functools.lru_cache(maxsize=2)."""
    while isinstance(decorator, ast.Call):
        decorator = decorator.func
    return str(getattr(decorator, "attr", getattr(decorator, "id", "")))


def main() -> None:
    """Write the files of the modules named on the command line."""
    parser = argparse.ArgumentParser(prog="python -m tasks.code", description=__doc__.split("\n")[0])
    parser.add_argument("folder", type=Path, help="where the files go")
    parser.add_argument("modules", nargs="+", metavar="module", help="as in `python -m MODULE`")
    arguments = parser.parse_args()
    try:
        contents = {module: content(module) for module in arguments.modules}
    except CodeError as error:
        sys.exit(f"code: {error}")
    arguments.folder.mkdir(parents=True, exist_ok=True)
    for module, text in contents.items():
        (arguments.folder / f"{module}.json").write_text(text)


if __name__ == "__main__":
    main()
