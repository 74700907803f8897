"""Print the import graph by rooms, with circles, upward arrows, large files and rooms with many doors.

    make house
    python -m bench.house               # the same; exit code 1 if there is a circle or an upward arrow

A room is a package, or a module of `tasks` that stands alone. A door of a room is a module that other rooms import.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

from tasks.code import Project

FOLDERS = {name: Path(name) for name in ("bench", "flows", "tasks")} | {"moe_kernels": Path("kernels/moe_kernels")}
FLOORS = [
    {"bench"},
    {"flows"},
    {"tasks.tools"},
    {"tasks.evaluate"},
    {"tasks.mixture", "tasks.control"},
    {"tasks.pretrain"},
    {"tasks.partition"},
    {"tasks.engines"},
    {"tasks.moe", "tasks.corpus"},
    {"tasks.settings", "tasks.sources"},  # and the modules of tasks that stand alone
    {"moe_kernels"},
]
"""From the top down: a room imports rooms of its own floor and of those below."""
BASE = 9
ONLY_FLOWS = {"prefect", "dvc"}
MOST_LINES = 300
MOST_DOORS = 15

Graph = dict[str, set[str]]


def room(module: str) -> str:
    """The room of a module: `tasks.pretrain` of `tasks.pretrain.loss.balance`."""
    parts = module.split(".")
    return ".".join(parts[: 2 if parts[0] == "tasks" else 1])


def floor(name: str) -> int:
    """The number of a room's floor, counted from the top."""
    return next((i for i, rooms in enumerate(FLOORS) if name in rooms), BASE)


def imports(project: Project) -> Graph:
    """{module: modules that it imports, lazily and for type checking too}."""
    graph = {}
    for module in project.modules:
        source = project.source(module)
        graph[module] = {name for name in source.imports | source.typing if name in project.modules} - {module}
    return graph


def between_rooms(graph: Graph) -> Graph:
    """{room: rooms that it imports}."""
    rooms: Graph = {}
    for module, targets in graph.items():
        rooms.setdefault(room(module), set()).update(room(target) for target in targets)
    return {name: targets - {name, "tasks"} for name, targets in rooms.items() if name != "tasks"}


def circle(graph: Graph) -> list[str]:
    """Modules or rooms that import each other in turn; empty if there is no circle."""
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        return list(error.args[1])
    return []


def upward(project: Project, graph: Graph) -> Iterator[str]:
    """Imports of a higher floor, of tasks.tools by a stage, and of Prefect and DVC by anything but flows."""
    for module, targets in sorted(graph.items()):
        for target in sorted(targets):
            if floor(room(target)) < floor(room(module)):
                yield f"{module} imports {target}"
        libraries = {name.partition(".")[0] for name in project.source(module).imports}
        if room(module) not in ("flows", "bench"):
            yield from (f"{module} imports {library}" for library in sorted(libraries & ONLY_FLOWS))


def doors(graph: Graph) -> Graph:
    """{room: its modules that others import}."""
    result: Graph = {}
    for module, targets in graph.items():
        for target in targets:
            if room(target) != room(module):
                result.setdefault(room(target), set()).add(target)
    return result


def main(argv: list[str] | None = None) -> int:
    """Print the graph and its faults. Returns 1 if there is a circle or an upward arrow."""
    parser = argparse.ArgumentParser(prog="python -m bench.house", description=__doc__.split("\n")[0])
    parser.parse_args(argv)
    project = Project({name: folder for name, folder in FOLDERS.items() if folder.is_dir()})
    graph = imports(project)
    rooms, open_doors = between_rooms(graph), doors(graph)
    lines = {module: len(path.read_text().splitlines()) for module, path in project.modules.items()}
    for name in sorted(rooms, key=lambda name: (floor(name), name)):
        own = [module for module in project.modules if room(module) == name]
        size = sum(lines[module] for module in own)
        below = ", ".join(sorted(rooms[name], key=lambda other: (floor(other), other))) or "nothing"
        print(f"{name}: {len(own)} files, {size:,} lines, {len(open_doors.get(name, ()))} doors; imports {below}")
    circles = [path for path in (circle(graph), circle(rooms)) if path]
    arrows = list(upward(project, graph))
    large = sorted((module for module in lines if lines[module] > MOST_LINES), key=lambda module: -lines[module])
    crowded = sorted(name for name, modules in open_doors.items() if len(modules) > MOST_DOORS)
    for title, faults in {
        "circles": [" -> ".join(each) for each in circles],
        "upward arrows": arrows,
        f"files over {MOST_LINES} lines": [f"{project.modules[module]} ({lines[module]})" for module in large],
        f"rooms with more than {MOST_DOORS} doors": [f"{name} ({len(open_doors[name])})" for name in crowded],
    }.items():
        print(f"{title}: {len(faults) or 'none'}", *(f"    {fault}" for fault in faults), sep="\n")
    return 1 if circles or arrows else 0


if __name__ == "__main__":
    sys.exit(main())
