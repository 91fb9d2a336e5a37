"""A case of the corpus: files that a script writes, the settings that read them, and whether they are usable.

Every case is written from a generator of its own, seeded by the case's name: adding a case changes no other one.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import anndata as ad
import h5py
import numpy as np
import pandas as pd
import scipy.sparse as sp

from helpers.files.fault_case import Case
from pipeline.config.job import IngestConfig
from pipeline.data.inspection.examine import Question

SEED = 2026
N, G = 48, 8
GENES = [f"ENSG{i:011d}" for i in range(G)]
QUESTION = ("layer", "measurement", "gene_id", "genome", "obs")  # settings of a source that validate-data also takes


@dataclass(frozen=True)
class CorpusCase:
    """One source of cells.

    Args:
        make: Writes the files into an empty folder, and returns the path that a user would name.
        source: More of ingest.source; "{folder}" in a text is the folder of the files.
        config: More of ingest.
        usable: Whether ingest must read the source; if not, validate-data must call it unusable. None: as validate-data
            says, of files of others.
    """

    name: str
    make: Callable[[Path, np.random.Generator], Path]
    source: Mapping[str, Any] = field(default_factory=dict)
    labels: tuple[str, ...] = ("cell_type",)
    config: Mapping[str, Any] = field(default_factory=dict)
    usable: bool | None = True

    @classmethod
    def of_fault(cls, case: Case) -> CorpusCase:
        """Return a row of the fault matrix as a case of the corpus."""
        name = f"fault {case.id}"
        return cls(name, lambda folder, rng: case.make(folder), case.source, case.labels, case.config, not case.refused)

    def written(self, folder: Path) -> Written:
        """Write the files into an empty folder."""
        return Written(self, folder, self.make(folder, np.random.default_rng([SEED, zlib.crc32(self.name.encode())])))


@dataclass(frozen=True)
class Written:
    """A case whose files exist."""

    case: CorpusCase
    folder: Path
    path: Path

    @property
    def source(self) -> dict[str, Any]:
        """ingest.source as a job has it."""
        given = _filled(self.case.source, self.folder)
        kind = given.get("type", "h5ad")
        return {"type": kind, "uri" if kind == "soma" else "path": str(self.path), **given}

    @property
    def config(self) -> IngestConfig:
        settings = {"labels": list(self.case.labels), **_filled(self.case.config, self.folder), "source": self.source}
        return IngestConfig.model_validate(settings)

    @property
    def question(self) -> Question:
        """What a user would ask validate-data about the same settings."""
        source = {k: v for k, v in self.source.items() if k in QUESTION}
        missing = {k: tuple(v) for k, v in self.case.config.items() if k == "missing_text"}
        return Question(str(self.path), labels=self.case.labels, **source, **missing)


def _filled(value: Any, folder: Path) -> Any:
    """Return settings with the folder of the files in place of "{folder}"."""
    if isinstance(value, Mapping):
        return {k: _filled(v, folder) for k, v in value.items()}
    return value.replace("{folder}", str(folder)) if isinstance(value, str) else value


# ---- cells ---------------------------------------------------------------------------------------------------------
def counts(rng: np.random.Generator, n: int = N, g: int = G) -> np.ndarray:
    """Draw counts, (n, g); every cell and every gene has some, and most genes are absent from many cells."""
    x = rng.poisson(rng.gamma(1.0, 1.0, g) + 0.3, (n, g))
    x[np.arange(n), np.arange(n) % g] += 1
    return x.astype(np.float32)


def some_cells(rng: np.random.Generator, n: int = N, genes: Iterable[str] = GENES, name: str = "c") -> ad.AnnData:
    """Draw cells with two classes of cell_type."""
    ids = list(genes)
    obs = pd.DataFrame({"cell_type": [("B", "T")[i % 2] for i in range(n)]}, index=[f"{name}{i}" for i in range(n)])
    return ad.AnnData(sp.csr_matrix(counts(rng, n, len(ids))), obs=obs, var=pd.DataFrame(index=ids))


Change = Callable[[ad.AnnData, np.random.Generator], ad.AnnData | None]


def h5ad(
    name: str, change: Change | None = None, *, edit: Callable[[h5py.File], None] | None = None, n: int = N,
    compression: str | None = None, **more: Any,
) -> CorpusCase:  # fmt: skip
    """Return a case of one `.h5ad` file.

    Args:
        change: Changes the cells in place, or returns others.
        edit: Changes the file afterwards, as another program could have written it.
        more: Fields of the case.
    """

    def make(folder: Path, rng: np.random.Generator) -> Path:
        cells = some_cells(rng, n)
        cells = (change(cells, rng) if change is not None else None) or cells
        with ad.settings.override(allow_write_nullable_strings=True):
            cells.write_h5ad(folder / "cells.h5ad", compression=compression)
        if edit is not None:
            with h5py.File(folder / "cells.h5ad", "r+") as file:
                edit(file)
        return folder / "cells.h5ad"

    return CorpusCase(name, make, **more)


def replaced(parent: h5py.Group, name: str, values: Any, **stored: Any) -> None:
    """Write other values in place of a dataset, and keep its attributes."""
    attributes = dict(parent[name].attrs)
    del parent[name]
    parent.create_dataset(name, data=values, **stored)
    parent[name].attrs.update(attributes)
