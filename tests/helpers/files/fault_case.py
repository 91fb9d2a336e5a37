"""A row of the fault matrix about cells: a file that is made, what is said of it, and what becomes of it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from helpers.files.h5ad_cases import look, told
from pipeline.config.context import StageContext
from pipeline.config.job import IngestConfig
from pipeline.stages import ingest
from scldm.errors import InputError


@dataclass(frozen=True)
class Case:
    """Something that may be wrong with cells.

    Args:
        row: Of the matrix.
        make: Writes the cells into an empty folder and gives the path that a user would name.
        says: Parts of what `scldm validate-data` says: what, how many, the first of them, what to do.
        refused: Parts of what ingest says; empty if it takes the cells, as it then must.
        takes: (cells, genes) that ingest keeps, where it takes them.
        notes: Parts of what the facts of ingest note.
        source: More of ingest.source.
        config: More of ingest.
    """

    row: str
    make: Callable[[Path], Path]
    says: tuple[str, ...] = ()
    refused: tuple[str, ...] = ()
    takes: tuple[int, int] = (40, 6)
    notes: tuple[str, ...] = ()
    labels: tuple[str, ...] = ("cell_type",)
    source: Mapping[str, Any] = field(default_factory=dict)
    config: Mapping[str, Any] = field(default_factory=dict)
    also: str = ""  # tells cases of one row apart

    @property
    def id(self) -> str:
        return f"{self.row}{'-' if self.also else ''}{self.also}"


def params(cases: Iterable[Case]) -> list[Any]:
    """For parametrize, each with its row."""
    return [pytest.param(case, id=case.id, marks=pytest.mark.row(case.row)) for case in cases]


def check_words(case: Case, path: Path) -> None:
    """What validate-data says, and that it calls usable what ingest takes and nothing else."""
    source = _in_folder(case.source, path)
    question = {k: v for k, v in source.items() if k in ("layer", "gene_id", "genome", "obs")}
    found = look(path, *case.labels, **question)
    text = told(found)
    for words in case.says:
        assert words in text, f"{words}\n--- not in\n{text}"
    assert bool(found.errors) == bool(case.refused), text
    assert all(f.remedy and f.count >= 1 for f in found.findings)
    assert all(c.isprintable() or c == "\n" for c in found.text())


def _in_folder(source: Mapping[str, Any], path: Path) -> dict[str, Any]:
    """Settings with the folder that the cells lie in."""
    return {k: v.format(folder=path.parent) if isinstance(v, str) else v for k, v in source.items()}


def check_ingest(case: Case, path: Path, folder: Path) -> None:
    """What ingest does, and that a refusal leaves nothing that looks like cells."""
    kind = case.source.get("type", "h5ad")
    place = {"uri": str(path)} if kind == "soma" else {"path": str(path)}
    source = {"type": kind, **place, **_in_folder(case.source, path)}
    config = IngestConfig.model_validate({"labels": list(case.labels), **case.config, "source": source})
    context = StageContext(folder, {}, 0, SimpleNamespace(), None)
    if not case.refused:
        facts = ingest.run(config, context)
        assert (sum(facts["n_cells"].values()), facts["n_genes"]) == case.takes
        for words in case.notes:
            assert any(words in note for note in facts["notes"]), facts["notes"]
        return
    with pytest.raises(InputError) as error:
        ingest.run(config, context)
    for words in case.refused:
        assert words in str(error.value), f"{words}\n--- not in\n{error.value}"
    assert list(folder.iterdir()) == []  # no experiment, whole or half, no table of cells
