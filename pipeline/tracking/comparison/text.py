"""Format a comparison as tables of plain characters, which can be read in a terminal, a file or an e-mail."""

from __future__ import annotations

from collections.abc import Sequence

from pipeline.tracking.comparison.compare import MetricRow, RunComparison


def as_text(found: RunComparison) -> str:
    """Return the tables; a star marks the side that is nearest to its floor."""
    letters = [chr(ord("A") + i) if i < 26 else str(i) for i in range(len(found.sides))]
    parts = ["\n".join(f"{letter}  {name}" for letter, name in zip(letters, found.sides, strict=True))]
    parts.append(_table([["made from", *letters], *([k, *_shown(v)] for k, v in found.lineage.items())]))
    if found.params:
        title = f"settings that differ ({len(found.params)})"
        parts.append(_table([[title, *letters], *([k, *_shown(v)] for k, v in found.params.items())]))
    else:
        parts.append("no setting differs")
    if found.training:
        parts.append(_table([["training", *letters], *([r.name, *_numbers(r.values)] for r in found.training)]))
    if found.metrics:
        parts.append(_scores_table(found.metrics, letters))
    return "\n\n".join([*parts, *(f"note: {n}" for n in found.notes)])


def _scores_table(rows: Sequence[MetricRow], letters: Sequence[str]) -> str:
    one_floor = all(len({text for text in _numbers(r.floors) if text != "–"}) <= 1 for r in rows)
    floors = ["floor"] if one_floor else [f"floor {x}" for x in letters]
    lines = [["score", "better", *floors, *letters]]
    for r in rows:
        shown = _numbers(r.values)
        marked = [f"{text} *" if i in r.best else f"{text}  " for i, text in enumerate(shown)]
        given = _numbers(r.floors)
        floor = [next((g for g in given if g != "–"), "–")] if one_floor else given
        better = f"near {r.ideal:g}" if r.better == "ideal" and r.ideal is not None else (r.better or "–")
        lines.append([r.name, better, *floor, *marked])
    return _table(lines) + "\n* nearest to its floor (real cells against real cells)"


def _numbers(values: Sequence[float | None]) -> list[str]:
    return ["–" if v is None else f"{v:,.0f}" if abs(v) >= 1e5 and v == int(v) else f"{v:.4g}" for v in values]


def _shown(values: Sequence[str | None]) -> list[str]:
    return ["–" if v is None else v if len(v) <= 40 else f"{v[:37]}..." for v in values]


def _table(rows: Sequence[Sequence[str]]) -> str:
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = ["  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip() for row in rows]
    return "\n".join([lines[0], "  ".join("-" * w for w in widths), *lines[1:]])
