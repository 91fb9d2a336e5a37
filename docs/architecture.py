"""Draw the rooms of the code and measure them: `python docs/architecture.py`.

Reads imports from the source. Writes docs/images/architecture.svg, the picture of docs/architecture.md, and prints a
table of sizes with --table. A contract test uses the same reading to hold that imports run one way.
"""

from __future__ import annotations

import argparse
import ast
import statistics
from collections.abc import Iterator, Mapping
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PICTURE = ROOT / "docs" / "images" / "architecture.svg"
Graph = Mapping[str, set[str]]

# A room may import rooms of lower levels. Rooms of one level do not import each other, but for the pairs below.
LEVELS = {
    "pipeline": {
        "core": 0, "config": 1, "data": 2, "cluster": 2, "tracking": 2, "report": 2, "training": 3, "inference": 3,
        "stages": 4, "workflow": 4, "planning": 5, "cli": 6, "__main__": 7,
    },
    "scldm": {
        "errors": 0, "text": 0, "config": 0, "random": 0, "data": 1, "nn": 2, "flow": 2, "metrics": 2,
        "optim": 3, "cells": 3, "checkpoints": 4, "generation": 5, "api": 6, "__init__": 7,
    },
}  # fmt: skip
SAME_LEVEL = {("pipeline.workflow", "pipeline.stages")}
PURPOSE = {
    "pipeline.core": "files, manifests, locks, logs",
    "pipeline.config": "what a job file may say",
    "pipeline.data": "cells: sources, SOMA, order, batches",
    "pipeline.cluster": "Ray: connect, start, submit",
    "pipeline.tracking": "MLflow runs, comparison",
    "pipeline.report": "scores and pictures",
    "pipeline.training": "workers, loop, checkpoints",
    "pipeline.inference": "generate and apply, shards, export",
    "pipeline.stages": "one module for each stage",
    "pipeline.workflow": "decide, check, run stages",
    "pipeline.planning": "sizes, memory, time",
    "pipeline.cli": "commands; training in a notebook",
    "scldm.data": "batches, vocabulary, library size",
    "scldm.nn": "VAE, DiT, kernels",
    "scldm.flow": "paths, solvers, guidance",
    "scldm.optim": "optimizer, schedule, EMA",
    "scldm.metrics": "distances, labels, intervals",
    "scldm.checkpoints": "model folders, upstream's checkpoints",
    "scldm.cells": "cells of many shards as one object",
    "scldm.generation": "requests, noise, cells",
    "scldm.api": "the model in a notebook",
}


# ---- reading -----------------------------------------------------------------------------------------------------
def source_files(root: Path) -> dict[str, Path]:
    """Module name -> file of every module of both packages."""
    found = {}
    for package in LEVELS:
        for path in sorted((root / package).rglob("*.py")):
            parts = path.relative_to(root).with_suffix("").parts
            found[".".join(parts[:-1] if parts[-1] == "__init__" and len(parts) > 2 else parts)] = path
    return found


def imported_names(tree: ast.Module, *, top_level_only: bool = False) -> Iterator[str]:
    """Yield `module` and `module.name` of every import, wherever it stands."""
    for node in tree.body if top_level_only else ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def import_graph(root: Path) -> dict[str, set[str]]:
    """Module -> modules of ours that it imports."""
    files = source_files(root)
    graph = {}
    for module, path in files.items():
        names = set(imported_names(ast.parse(path.read_text())))
        graph[module] = {n for n in names if n in files and n != module and not _is_package(files[n])}
    return graph


def _is_package(path: Path) -> bool:
    return path.name == "__init__.py"


def room_of(module: str) -> str:
    """`pipeline.data` of `pipeline.data.soma.store`."""
    return ".".join(module.split(".")[:2])


def level_of(module: str) -> int:
    package, room = room_of(module).split(".")
    return LEVELS[package][room]


# ---- what must hold ----------------------------------------------------------------------------------------------
def circles(graph: Graph) -> list[list[str]]:
    """Groups of modules that import each other, directly or through others."""
    reached = {module: _reachable(graph, module) for module in graph}
    groups = {
        frozenset(m for m in reached[module] if module in reached[m]) for module in graph if module in reached[module]
    }
    return sorted(sorted(group) for group in groups)


def _reachable(graph: Graph, start: str) -> set[str]:
    found: set[str] = set()
    todo = list(graph.get(start, ()))
    while todo:
        module = todo.pop()
        if module not in found:
            found.add(module)
            todo += graph.get(module, ())
    return found


def upward_imports(graph: Graph) -> list[tuple[str, str]]:
    """Imports of a room on the same level or above, and imports from scldm to pipeline."""
    found = []
    for module, targets in graph.items():
        for target in targets:
            a, b = room_of(module), room_of(target)
            if a == b or (a, b) in SAME_LEVEL or (a.startswith("pipeline") and b.startswith("scldm")):
                continue
            if a.split(".")[0] != b.split(".")[0] or level_of(target) >= level_of(module):
                found.append((module, target))
    return sorted(found)


# ---- sizes -------------------------------------------------------------------------------------------------------
def table(root: Path) -> str:
    """Sizes of files and functions, types and docstrings, for each package and the tests, as Markdown."""
    lines = [
        "| | modules | lines | most names in a folder | file p50/p90/max | function p90/max | arguments annotated | "
        "public functions with docstring |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name in ("scldm", "pipeline", "tests"):
        paths = [p for p in sorted((root / name).rglob("*.py")) if "golden" not in p.parts]
        lines.append(_row(name, paths))
    return "\n".join(lines)


def _row(name: str, paths: list[Path]) -> str:
    lengths = sorted(len(p.read_text().splitlines()) for p in paths if p.name != "__init__.py")
    folders: dict[Path, int] = {}
    for path in paths:
        folders[path.parent] = folders.get(path.parent, 0) + (path.name != "__init__.py")
    functions, arguments, annotated, public, described = [], 0, 0, 0, 0
    for path in paths:
        for node in ast.walk(ast.parse(path.read_text())):
            if not isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
                continue
            functions.append((node.end_lineno or node.lineno) - node.lineno + 1)
            given = [
                a
                for a in (*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs)
                if a.arg not in ("self", "cls")
            ]
            arguments += len(given)
            annotated += sum(a.annotation is not None for a in given)
            if not node.name.startswith("_"):
                public += 1
                described += ast.get_docstring(node) is not None
    functions.sort()
    p90 = lambda values: values[int(0.9 * (len(values) - 1))]  # noqa: E731
    return (
        f"| {name} | {len(lengths)} | {sum(lengths):,} | {max(folders.values())} | "
        f"{statistics.median_low(lengths)}/{p90(lengths)}/{lengths[-1]} | {p90(functions)}/{functions[-1]} | "
        f"{annotated / max(1, arguments):.0%} | {described / max(1, public):.0%} |"
    )


# ---- the picture -------------------------------------------------------------------------------------------------
WIDTH, HEIGHT, GAP, LEFT = 215, 58, 22, 20


def picture(root: Path) -> str:
    """SVG: a box for each room, its level as height, arrows to the rooms that it imports.

    An arrow that a longer way implies is left out: with a -> b -> c, a -> c is not drawn. That pipeline may import all
    of scldm is a sentence in the picture.
    """
    graph = import_graph(root)
    rooms: dict[str, set[str]] = {room_of(module): set() for module in graph}
    for module, targets in graph.items():
        room = room_of(module)
        rooms[room] |= {r for r in map(room_of, targets) if r != room and r.split(".")[0] == room.split(".")[0]}
    edges = _without_detours(rooms)
    places = _places()
    width = max(x for x, _ in places.values()) + WIDTH + LEFT
    height = max(y for _, y in places.values()) + HEIGHT + LEFT
    svg = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" font-family="sans-serif">',
        f'<rect width="{width}" height="{height}" fill="#ffffff"/>',
        '<defs><marker id="a" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" markerHeight="7" orient="auto">'
        '<path d="M0 0 L8 4 L0 8 z" fill="#90a4ae"/></marker></defs>',
    ]
    for a, b in sorted(edges):
        if a in places and b in places:
            (ax, ay), (bx, by) = places[a], places[b]
            start, end = (ax + WIDTH / 2, ay + HEIGHT), (bx + WIDTH / 2, by)
            if ay == by:
                start, end = (
                    (ax + (WIDTH if bx > ax else 0), ay + HEIGHT / 2),
                    (bx + (0 if bx > ax else WIDTH), by + HEIGHT / 2),
                )
            svg.append(
                f'<line x1="{start[0]}" y1="{start[1]}" x2="{end[0]}" y2="{end[1]}" stroke="#b0bec5" stroke-width="1" '
                'marker-end="url(#a)"/>'
            )
    border = places["scldm.api"][1] - 20
    svg += [
        f'<line x1="0" y1="{border}" x2="{width}" y2="{border}" stroke="#90a4ae" stroke-dasharray="6 5"/>',
        f'<text x="{LEFT}" y="{border - 10}" font-size="12" fill="#455a64">pipeline imports scldm, never back: scldm '
        "installs and works without Ray, DeepSpeed, TileDB and MLflow</text>",
    ]
    for room, (x, y) in places.items():
        colour = "#e3f2fd" if room.startswith("pipeline") else "#e8f5e9"
        svg += [
            f'<rect x="{x}" y="{y}" width="{WIDTH}" height="{HEIGHT}" rx="6" fill="{colour}" stroke="#607d8b"/>',
            f'<text x="{x + 10}" y="{y + 24}" font-size="14" font-weight="bold">{room}</text>',
            f'<text x="{x + 10}" y="{y + 43}" font-size="10.5">{PURPOSE[room]}</text>',
        ]
    return "\n".join([*svg, "</svg>", ""])


def _without_detours(rooms: Graph) -> set[tuple[str, str]]:
    """The transitive reduction of the graph of rooms."""
    reached = {room: _reachable(rooms, room) for room in rooms}
    return {(a, b) for a in rooms for b in rooms[a] if not any(b in reached[c] for c in rooms[a] - {b})}


def _places() -> dict[str, tuple[int, int]]:
    """Upper left corner of each room: the command line on top, what everything stands on at the bottom."""
    places: dict[str, tuple[int, int]] = {}
    top = LEFT
    for package in ("pipeline", "scldm"):
        rows: dict[int, list[str]] = {}
        for room, level in LEVELS[package].items():
            if f"{package}.{room}" in PURPOSE:
                rows.setdefault(level, []).append(f"{package}.{room}")
        for level in sorted(rows, reverse=True):
            indent = (4 - len(rows[level])) * (WIDTH + GAP) // 2
            for i, room in enumerate(rows[level]):
                places[room] = (LEFT + indent + i * (WIDTH + GAP), top)
            top += HEIGHT + 46
        top += 36
    return places


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--table", action="store_true", help="print sizes as Markdown and draw nothing")
    if parser.parse_args().table:
        print(table(ROOT))
        return
    PICTURE.write_text(picture(ROOT))
    print(f"wrote {PICTURE.relative_to(ROOT)}")


if __name__ == "__main__":
    main()
