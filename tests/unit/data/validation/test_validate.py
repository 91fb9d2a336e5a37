"""What is not raw counts, or lacks its labels, is refused with the reason and the remedy."""

from pathlib import Path

import anndata as ad
import h5py
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp

from pipeline.config.job import H5adSource
from pipeline.data.sources.h5ad import read_h5ad
from pipeline.data.validation.checks import checked
from scldm.errors import InputError

SHARED = Path(__file__).resolve().parents[4].parent / "shared" / "data"
real = pytest.mark.skipif(not SHARED.is_dir(), reason=f"the real cells are not at {SHARED}")
pytestmark = pytest.mark.filterwarnings("ignore")


def read(path, labels=("cell_type",), drop_missing=False, **kwargs):
    """All counts of a source, checked; with its tables."""
    tables = read_h5ad(H5adSource(type="h5ad", path=str(path), **kwargs), labels)
    return tables, sp.vstack(list(checked(tables, labels, drop_missing=drop_missing)), format="csr")


def write(path, x, genes=None, **obs):
    n, g = x.shape
    frame = pd.DataFrame({"cell_type": ["a", "b"] * (n // 2), **obs}, index=[f"c{i}" for i in range(n)])
    var = pd.DataFrame(index=genes or [f"ENSG0000000000{i}.{i}" for i in range(g)])
    ad.AnnData(x, obs=frame, var=var).write_h5ad(path)
    return path


@pytest.fixture
def counts():
    return np.random.default_rng(0).poisson(0.7, (40, 6)).astype(np.float32) + np.eye(40, 6, dtype=np.float32)


@real
def test_real_counts_are_accepted():
    tables, counts = read(SHARED / "pbmc3k_full.h5ad")
    assert counts.shape == (2638, 32738)
    assert counts.nnz == 2242529
    assert any('no tissue_general, assay, dataset_id, donor_id; "unknown"' in note for note in tables.notes)


@real
def test_scaled_values_are_refused():
    with pytest.raises(InputError, match=r"values of 700 cells are negative \(first: cell AAAGCCTGGCTAAC-1, gene HES4"):
        read(SHARED / "edge/h5ad_versions/anndata_v0.5.0.h5ad", columns={"cell_type": "bulk_labels"})


@real
def test_normalised_values_are_refused_with_where_the_counts_are():
    path = SHARED / "edge/h5ad_versions/zellkonverter_example_anndata.h5ad"
    with pytest.raises(InputError, match=r"(?s)not whole numbers .*value 1.56.*set ingest.source.layer: counts"):
        read(path, ["louvain"])
    assert read(path, ["louvain"], layer="counts")[1].shape == (200, 459)


@real
def test_missing_labels_are_counted_and_can_be_dropped():
    path = SHARED / "edge/pbmc3k_2700_62missing_labels.h5ad"
    with pytest.raises(InputError, match=r"62 of 2700 cells have no cell_type .*ingest.missing_label: drop"):
        read(path)
    assert read(path, drop_missing=True)[1].shape[0] == 2700


@pytest.mark.parametrize("kind", [np.asarray, sp.csr_matrix, sp.csc_matrix, lambda x: x.astype(np.int64)])
def test_any_storage_of_counts_reads_the_same(tmp_path, counts, kind):
    _, found = read(write(tmp_path / "a.h5ad", kind(counts)))
    np.testing.assert_array_equal(found.toarray(), counts)


def test_nan_negative_and_fractions_are_reported_together(tmp_path, counts):
    counts[0, 0], counts[1, 1], counts[2, 2] = np.nan, -1, 0.5
    with pytest.raises(InputError) as error:
        read(write(tmp_path / "a.h5ad", counts), labels=["cell_typ"])
    for words in ("NaN or infinite (first: cell c0", "negative (first: cell c1", "not whole numbers (first: cell c2",
                  "did you mean 'cell_type'?"):  # fmt: skip
        assert words in str(error.value)


def test_repeated_genes_and_too_few_cells_are_refused(tmp_path, counts):
    with pytest.raises(InputError, match=r"(?s)10 cells are too few.*1 gene ids occur more than once \(first: x\)"):
        read(write(tmp_path / "a.h5ad", counts[:10], genes=["x", "x", "c", "d", "e", "f"]))


def test_empty_cells_are_noted_and_versions_stripped(tmp_path, counts):
    counts[3] = 0
    tables, _ = read(write(tmp_path / "a.h5ad", counts))
    assert "1 of 40 cells have no counts and are left out." in tables.notes
    assert tables.var["feature_id"].tolist() == [f"ENSG0000000000{i}" for i in range(6)]


def test_wrong_files_are_told_apart(tmp_path):
    (tmp_path / "text.h5ad").write_text("hello")
    with h5py.File(tmp_path / "tenx.h5", "w") as f:
        f.create_group("matrix")
    (tmp_path / "empty").mkdir()
    for name, words in {
        "text.h5ad": "is not an HDF5 file",
        "tenx.h5": r"HDF5 but not .h5ad: it has no obs and no var \(it holds matrix\);.*type: 10x",
        "empty": "holds no .h5ad file",
        "absent.h5ad": "no such file, folder or pattern.*has empty, tenx.h5, text.h5ad",
    }.items():
        with pytest.raises(InputError, match=words):
            read(tmp_path / name)


def test_wrong_columns_are_answered_with_near_ones(tmp_path, counts):
    path = write(tmp_path / "a.h5ad", counts, louvain=["1", "2"] * 20)
    with pytest.raises(InputError, match=r"(?s)no var column 'gene'.*no obs column 'luvain' \(did you mean 'louvain'"):
        read(path, gene_id="gene", columns={"cell_type": "luvain"})
    assert read(path, columns={"cell_type": "louvain"})[0].obs["cell_type"].tolist() == ["1", "2"] * 20


def test_genes_of_several_files_are_matched_by_id(tmp_path, counts):
    write(tmp_path / "a.h5ad", counts, genes=list("abcdef"))
    write(tmp_path / "b.h5ad", sp.csr_matrix(counts), genes=list("abcdef"))
    write(tmp_path / "c.h5ad", counts[:, ::-1], genes=list("gedcba"))
    tables, found = read(tmp_path)
    assert tables.var["feature_id"].tolist() == list("abcdefg")
    np.testing.assert_array_equal(found[:80, :6].toarray(), np.vstack([counts, counts]))
    np.testing.assert_array_equal(found[80:, :5].toarray(), counts[:, :5])
    np.testing.assert_array_equal(found[80:, 6].toarray().ravel(), counts[:, 5])
    assert set(tables.obs["dataset_id"]) == {"a", "b", "c"}
    assert any("c.h5ad lacks 1 of 7 genes" in note for note in tables.notes)
