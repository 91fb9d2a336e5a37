"""Only features of gene expression are read, from files alone and together, and from experiments of any size."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import anndata as ad
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp
from helpers.files.faulty_experiments import described
from helpers.files.h5ad_cases import G, N, counts, look, save, told

from pipeline.config.context import StageContext
from pipeline.config.job import H5adSource, IngestConfig
from pipeline.data.sources.h5ad import read_h5ad
from pipeline.data.validation.feature_types import gene_features, genes_of_var
from pipeline.stages import ingest
from scldm.errors import InputError

pytestmark = pytest.mark.filterwarnings("ignore")
IDS = [f"ENSG{i:011d}" for i in range(G)]
TYPES = ["Antibody Capture", "Gene Expression", "gene expression", "Custom", "GENE EXPRESSION", "Gene Expression"]
GENES = [1, 2, 4, 5]


def typed(path: Path, types: list[str | None] = TYPES, dense: bool = False, raw: bool = False) -> Path:
    """A file of the usual cells whose features have types."""
    names = [f"{path.stem}{i}" for i in range(N)]
    cells = ad.read_h5ad(save(path, counts() if dense else None, names=names))
    cells.var["feature_types"] = types
    if raw:
        cells.raw = cells
        cells.X = cells.X * 0.5
    cells.write_h5ad(path)
    return path


def source(path: Path, **more: str) -> H5adSource:
    return H5adSource.model_validate({"type": "h5ad", "path": str(path), **more})


@pytest.mark.parametrize("more", [{}, {"dense": True}, {"raw": True}], ids=str)
def test_counts_of_other_features_are_left_out(more, tmp_path):
    layer = {"layer": "raw"} if "raw" in more else {}
    path = typed(tmp_path / "a.h5ad", **more)
    tables = read_h5ad(source(path, **layer))
    assert tables.var["feature_id"].tolist() == [IDS[i] for i in GENES]
    np.testing.assert_array_equal(sp.vstack(list(tables.chunks())).toarray(), counts()[:, GENES])
    assert look(path, **layer).facts["genes"] == len(GENES)


def test_files_with_other_features_are_read_with_files_without(tmp_path):
    typed(tmp_path / "a.h5ad")
    save(tmp_path / "b.h5ad", names=[f"b{i}" for i in range(N)])
    tables = read_h5ad(source(tmp_path))
    assert tables.var["feature_id"].tolist() == [IDS[i] for i in [*GENES, 0, 3]]
    read = sp.vstack(list(tables.chunks())).toarray()
    np.testing.assert_array_equal(read[:N, :4], counts()[:, GENES])
    assert read[:N, 4:].sum() == 0
    np.testing.assert_array_equal(read[N:], counts()[:, [*GENES, 0, 3]])
    assert "a.h5ad: 2 of 6 features are no genes (1 Antibody Capture, 1 Custom); they are left out" in " ".join(
        tables.notes
    )


def test_a_fault_among_other_features_is_no_fault(tmp_path):
    path = typed(tmp_path / "a.h5ad")
    cells = ad.read_h5ad(path)
    cells.X[3, 0] = -1
    cells.write_h5ad(path)
    assert look(path).errors == []
    assert len(list(read_h5ad(source(path)).chunks())) == 1
    assert "negative" not in told(look(path))


@pytest.mark.parametrize("full_pass", [10, 1000])
def test_library_sizes_of_a_large_experiment_are_of_its_genes(full_pass, tmp_path, monkeypatch):
    monkeypatch.setattr(ingest, "FULL_PASS_CELLS", full_pass)
    path = described(feature_id=IDS, feature_types=TYPES)(tmp_path)
    config = IngestConfig.model_validate({"source": {"type": "soma", "uri": str(path)}, "labels": ["cell_type"]})
    (tmp_path / "made").mkdir()
    facts = ingest.run(config, StageContext(tmp_path / "made", {}, 0, SimpleNamespace(), None))
    assert facts["n_genes"] == len(GENES)
    cells = pd.read_parquet(tmp_path / "made" / "cells.parquet")
    np.testing.assert_array_equal(cells["library_size"], counts()[:, GENES].sum(1))


def test_a_column_of_other_types_chooses_nothing():
    var = pd.DataFrame({"feature_types": ["protein_coding", "lncRNA"]})
    assert genes_of_var(var, "x").left_out == {}
    assert genes_of_var(var.drop(columns="feature_types"), "x").positions is None
    assert genes_of_var(var.assign(feature_types=None), "x").kept.all()


def test_without_a_gene_the_types_are_named():
    with pytest.raises(
        InputError, match=r"x has no Gene Expression features, only others \(2 Peaks, 1 without a type\)"
    ):
        gene_features(pd.Series(["Peaks", None, "Peaks"]), "x")
