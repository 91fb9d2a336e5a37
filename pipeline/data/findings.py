"""Findings about data, and their report.

Names come from untrusted files: they are shown through `shown`, which escapes what a terminal would interpret.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

import pandas as pd

from scldm.text import shown

FIRST = 3  # examples that are named
MAX_SHOWN = 20  # items of a list of facts; the JSON has them all


@dataclass(frozen=True)
class Finding:
    """One problem: an error makes the data unusable, a warning does not."""

    level: Literal["error", "warning"]
    what: str
    remedy: str
    count: int = 1
    first: tuple[str, ...] = ()

    @property
    def message(self) -> str:
        """The problem, its first examples, and the remedy."""
        examples = f" (first: {'; '.join(self.first)})" if self.first else ""
        return f"{self.what}{examples}; {self.remedy}"

    def text(self) -> str:
        return f"{self.level}: {self.message}"


def error(what: str, remedy: str, *, count: int = 1, first: Iterable[Any] = ()) -> Finding:
    return Finding("error", what, remedy, count, tuple(shown(x) for x in list(first)[:FIRST]))


def warning(what: str, remedy: str, *, count: int = 1, first: Iterable[Any] = ()) -> Finding:
    return Finding("warning", what, remedy, count, tuple(shown(x) for x in list(first)[:FIRST]))


@dataclass
class Examined:
    """Contents of one file or experiment, and the findings about it."""

    where: str
    kind: str  # h5ad, 10x, SOMA
    facts: dict[str, Any] = field(default_factory=dict)
    findings: list[Finding] = field(default_factory=list)
    gene_ids: list[str] | None = None  # for comparing files; not part of the report
    var: pd.DataFrame | None = None  # likewise
    cell_hashes: Any = field(default=None, repr=False)  # (n, 2), until all files are compared

    @property
    def errors(self) -> Sequence[Finding]:
        return [f for f in self.findings if f.level == "error"]

    def text(self) -> str:
        """Return the report as text: contents, errors, warnings."""
        n = len(self.errors)
        lines = [f"{shown(self.where, 4096)} ({self.kind}): " + (f"{n} error{'s'[: n != 1]}" if n else "usable")]
        lines += [f"  {name}: {_fact(value)}" for name, value in self.facts.items()]
        lines += [f"  {f.text()}" for f in sorted(self.findings, key=lambda f: f.level)]
        return "\n".join(lines)

    def to_json(self) -> dict[str, Any]:
        return {
            "where": self.where,
            "kind": self.kind,
            "facts": self.facts,
            "findings": [asdict(f) for f in self.findings],
            "usable": not self.errors,
        }


def _fact(value: object) -> str:
    if isinstance(value, dict):
        return _some([f"{shown(k)} {_fact(v)}" for k, v in value.items()])
    if isinstance(value, (list, tuple)):
        return _some([shown(v) for v in value])
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else shown(value)


def _some(texts: list[str]) -> str:
    more = len(texts) - MAX_SHOWN
    return ", ".join(texts[:MAX_SHOWN] + ([f"… and {more:,} more"] if more > 0 else [])) or "none"
