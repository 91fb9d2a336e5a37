"""The list of fault points and the calls in the code are the same, module by module."""

from __future__ import annotations

import ast
from pathlib import Path

from pipeline.core.fault_points import POINTS

ROOT = Path(__file__).resolve().parents[2]


def calls() -> dict[str, list[tuple[str, bool]]]:
    """Point -> (module, whether the call names a step) of every call of `fault_point` in the code.

    A `ShardStore` passes the points that its `CommitPoints` names: they count where they are named.
    """
    found: dict[str, list[tuple[str, bool]]] = {}
    for package in ("pipeline", "scldm"):
        for path in sorted((ROOT / package).rglob("*.py")):
            module = ".".join(path.relative_to(ROOT).with_suffix("").parts)
            for node in ast.walk(ast.parse(path.read_text())):
                called = getattr(node.func, "id", "") if isinstance(node, ast.Call) else ""
                if called == "CommitPoints":
                    for name in node.args:
                        assert isinstance(name, ast.Constant), f"{module}:{node.lineno}: the names must stand there"
                        found.setdefault(name.value, []).append((module, False))
                elif called == "fault_point":
                    name = node.args[0]
                    if module == "pipeline.core.shards" and ast.unparse(name).startswith("self.points."):
                        continue
                    assert isinstance(name, ast.Constant), f"{module}:{node.lineno}: the name must stand there"
                    found.setdefault(name.value, []).append((module, any(k.arg == "step" for k in node.keywords)))
    return found


def test_every_point_that_is_listed_is_passed_where_it_says_and_the_other_way_round():
    found = calls()
    assert found.keys() == POINTS.keys()
    for name, places in found.items():
        assert [module for module, _ in places] == [POINTS[name].where], f"{name}: one place, the one that is listed"
        assert [steps for _, steps in places] == [POINTS[name].has_step], f"{name}: has_step"


def test_names_say_the_part_and_the_moment():
    for name in POINTS:
        part, moment = name.split(".")
        assert part.isidentifier()
        assert moment.startswith(("before_", "in_", "after_")), name
