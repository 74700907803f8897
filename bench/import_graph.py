"""Print the import graph by packages, with circles, upward imports, large files and much-imported packages.

    make imports
    python -m bench.import_graph        # the same; exit code 1 if there is a circle or an upward import

A package is one of `tasks`, a plug-in, or a module of `tasks` that stands alone.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

from tasks.code import Project

FOLDERS = {name: Path(name) for name in ("bench", "flows", "tasks")} | {"moe_kernels": Path("kernels/moe_kernels")}
PLUGINS = "tasks.plugins"
LAYERS = [
    {"bench"},
    {"flows"},
    {"tasks.tools"},
    {PLUGINS},
    {"tasks.evaluate"},
    {"tasks.mixture", "tasks.control"},
    {"tasks.pretrain"},
    {"tasks.partition"},
    {"tasks.engines"},
    {"tasks.moe", "tasks.corpus"},
    {"tasks.settings", "tasks.sources"},  # and the modules of tasks that stand alone
    {"moe_kernels"},
]
"""From the top down: a package imports those of its own layer and of the layers below."""
BASE = 10
ANYWHERE = {"bench", PLUGINS}
"""Only these name a plug-in: the rest asks tasks/plugin.py."""
ONLY_FLOWS = {"prefect", "dvc"}
MOST_LINES = 300
MOST_IMPORTED = 15

Graph = dict[str, set[str]]


def package(module: str) -> str:
    """The package of a module: `tasks.pretrain` of `tasks.pretrain.loss.balance`, a plug-in's with its name."""
    parts = module.split(".")
    return ".".join(parts[: 3 if module.startswith(f"{PLUGINS}.") else 2 if parts[0] == "tasks" else 1])


def layer(name: str) -> int:
    """The number of a package's layer, counted from the top."""
    name = PLUGINS if name.startswith(PLUGINS) else name
    return next((i for i, packages in enumerate(LAYERS) if name in packages), BASE)


def imports(project: Project) -> Graph:
    """{module: modules that it imports, inside functions and for type checking too}."""
    graph = {}
    for module in project.modules:
        source = project.source(module)
        graph[module] = {name for name in source.imports | source.typing if name in project.modules} - {module}
    return graph


def between_packages(graph: Graph) -> Graph:
    """{package: packages that it imports}."""
    packages: Graph = {}
    for module, targets in graph.items():
        packages.setdefault(package(module), set()).update(package(target) for target in targets)
    return {name: targets - {name, "tasks"} for name, targets in packages.items() if name != "tasks"}


def circle(graph: Graph) -> list[str]:
    """Modules or packages that import each other in turn; empty if there is no circle."""
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        return list(error.args[1])
    return []


def upward(project: Project, graph: Graph) -> Iterator[str]:
    """Imports of a higher layer, of a plug-in by the core, and of Prefect and DVC by anything but flows."""
    for module, targets in sorted(graph.items()):
        own = package(module)
        for target in sorted(targets):
            is_foreign = target.startswith(f"{PLUGINS}.") and not own.startswith(tuple(ANYWHERE))
            if is_foreign or layer(package(target)) < layer(own):
                yield f"{module} imports {target}"
        libraries = {name.partition(".")[0] for name in project.source(module).imports}
        if own not in ("flows", "bench"):
            yield from (f"{module} imports {library}" for library in sorted(libraries & ONLY_FLOWS))


def imported(graph: Graph) -> Graph:
    """{package: its modules that others import}."""
    result: Graph = {}
    for module, targets in graph.items():
        for target in targets:
            if package(target) != package(module):
                result.setdefault(package(target), set()).add(target)
    return result


def main(argv: list[str] | None = None) -> int:
    """Print the graph and its faults. Returns 1 if there is a circle or an upward import."""
    parser = argparse.ArgumentParser(prog="python -m bench.import_graph", description=__doc__.split("\n")[0])
    parser.parse_args(argv)
    project = Project({name: folder for name, folder in FOLDERS.items() if folder.is_dir()})
    graph = imports(project)
    packages, open_modules = between_packages(graph), imported(graph)
    lines = {module: len(path.read_text().splitlines()) for module, path in project.modules.items()}
    for name in sorted(packages, key=lambda name: (layer(name), name)):
        own = [module for module in project.modules if package(module) == name]
        size = sum(lines[module] for module in own)
        below = ", ".join(sorted(packages[name], key=lambda other: (layer(other), other))) or "nothing"
        count = len(open_modules.get(name, ()))
        print(f"{name}: {len(own)} files, {size:,} lines, others import {count}; imports {below}")
    circles = [path for path in (circle(graph), circle(packages)) if path]
    arrows = list(upward(project, graph))
    large = sorted((module for module in lines if lines[module] > MOST_LINES), key=lambda module: -lines[module])
    crowded = sorted(name for name, modules in open_modules.items() if len(modules) > MOST_IMPORTED)
    for title, faults in {
        "circles": [" -> ".join(each) for each in circles],
        "upward imports": arrows,
        f"files over {MOST_LINES} lines": [f"{project.modules[module]} ({lines[module]})" for module in large],
        f"packages of which others import more than {MOST_IMPORTED} modules": [
            f"{name} ({len(open_modules[name])})" for name in crowded
        ],
    }.items():
        print(f"{title}: {len(faults) or 'none'}", *(f"    {fault}" for fault in faults), sep="\n")
    return 1 if circles or arrows else 0


if __name__ == "__main__":
    sys.exit(main())
