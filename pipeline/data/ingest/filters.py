"""Builds one SOMA value filter on obs from the conditions of a job.

SOMA parses a filter as a Python expression, so values are quoted with `repr`, which handles `10x 3' v3`, and column
names with `attr`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from pipeline.config.ingest import CellsConfig, Value
from pipeline.data.soma.store import SomaStore
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


def check_values(cells: CellsConfig, store: SomaStore) -> None:
    """Check every column and value of a filter against the store, as far as its categories are known.

    A misspelled value would silently select fewer cells.

    Raises:
        InputError: with everything that is wrong.
    """
    problems = []
    available = store.obs_columns()
    for column, values in cells.conditions().items():
        field = _field(cells, column)
        if column not in available:
            hint = "; the Census has one experiment for each: ingest.source.organism" if column == "organism" else ""
            problems.append(f"{field}: obs has no column {column!r} ({choices_hint(column, available)}){hint}")
            continue
        known = store.categories(column)
        if known is None:
            continue
        for value in values:
            if value not in known:
                near = choices_hint(str(value), known[:2000], "it has")
                near = near if len(near) < 400 else f"{near[:400]}…"
                problems.append(f"{field}: obs column {column!r} has no value {value!r} ({near})")
    if problems:
        raise InputError("\n".join(problems))


def _field(cells: CellsConfig, column: str) -> str:
    if column in cells.where:
        return f"ingest.cells.where.{column}"
    return "ingest.cells." + {"tissue_general": "tissue"}.get(column, column)


def _one_of(column: str, values: Sequence[Value]) -> str:
    name = f"attr({column!r})"  # works for any column name, also a Python keyword
    if len(values) > 1 and all(isinstance(v, str) for v in values):
        return f"{name} in {list(values)!r}"
    return " or ".join(f"{name} == {v!r}" for v in values)  # `in` is refused for booleans and some numbers
