"""Builds one SOMA value filter on obs from the conditions of a job.

SOMA parses a filter as a Python expression, so values are quoted with `repr`, which handles `10x 3' v3`, and column
names with `attr`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from pipeline.config.ingest import CellsConfig, Value
from pipeline.data.soma.store import SomaStore
from scldm.data.class_names import ClassFinder, class_text
from scldm.errors import InputError
from scldm.text import choices_hint


def value_filter(conditions: Mapping[str, Sequence[Value]], obs_filter: str | None = None) -> str | None:
    """Join all conditions and `obs_filter` by "and"; None selects every cell.

    Args:
        conditions: obs column -> allowed values.
        obs_filter: A SOMA value filter.
    """
    parts = [_one_of(column, values) for column, values in conditions.items()]
    if obs_filter:
        parts.append(obs_filter)
    return " and ".join(f"({p})" for p in parts) if len(parts) > 1 else next(iter(parts), None)


def find_values(cells: CellsConfig, store: SomaStore) -> dict[str, list[Value]]:
    """Return the conditions of a job with the values as the store holds them: 1 finds the text "1".

    A misspelled value would silently select fewer cells, so values are compared with the categories of a column, as
    far as it has any.

    Raises:
        InputError: with everything that is wrong.
    """
    problems: list[str] = []
    found = {}
    available = store.obs_columns()
    for column, values in cells.conditions().items():
        field = _field(cells, column)
        if column not in available:
            hint = "; the Census has one experiment for each: ingest.source.organism" if column == "organism" else ""
            problems.append(f"{field}: obs has no column {column!r} ({choices_hint(column, available)}){hint}")
            continue
        known = store.categories(column)
        where = f"{field}: obs column {column!r}"
        if known is None:
            found[column] = [_typed(v, store.kind(column), where, problems) for v in values]
        else:
            found[column] = _categories(values, known, where, problems)
    if problems:
        raise InputError("\n".join(problems))
    return found


def _categories(values: Sequence[Value], known: Sequence[Any], where: str, problems: list[str]) -> list[Value]:
    """Return the categories that values stand for, by the names of classes; others become problems."""
    held = {class_text(k): k for k in known}
    finder = ClassFinder(held)
    found = []
    for value in values:
        if (name := finder.find(class_text(value))) is not None:
            found.append(held[name])
            continue
        near = choices_hint(class_text(value), list(held)[:2000], "it has")
        near = near if len(near) < 400 else f"{near[:400]}…"
        problems.append(f"{where} has no value {value!r} ({near})")
    return found


def _typed(value: Value, kind: str, where: str, problems: list[str]) -> Value:
    """Return a value in the type of a column; one that has no such form becomes a problem."""
    text = class_text(value)
    if kind == "text":
        return text
    if kind == "boolean" and text in ("True", "False"):
        return text == "True"
    if kind == "number" and not isinstance(value, bool):
        try:
            return value if not isinstance(value, str) else float(value)
        except ValueError:
            pass
    if kind in ("boolean", "number"):
        problems.append(f"{where} holds {'numbers' if kind == 'number' else 'true and false'}, and {value!r} is none")
    return value


def _field(cells: CellsConfig, column: str) -> str:
    if column in cells.where:
        return f"ingest.cells.where.{column}"
    return "ingest.cells." + {"tissue_general": "tissue"}.get(column, column)


def _one_of(column: str, values: Sequence[Value]) -> str:
    name = f"attr({column!r})"  # works for any column name, also a Python keyword
    if len(values) > 1 and all(isinstance(v, str) for v in values):
        return f"{name} in {list(values)!r}"
    return " or ".join(f"{name} == {v!r}" for v in values)  # `in` is refused for booleans and some numbers
