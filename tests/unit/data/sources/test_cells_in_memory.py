"""Cells as people hold them become a source of a job: counts found, the same cells in the same file."""

from __future__ import annotations

import anndata
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp

from pipeline.data.sources.in_memory import source_of
from scldm.errors import InputError


@pytest.fixture
def cells() -> anndata.AnnData:
    rng = np.random.default_rng(0)
    obs = pd.DataFrame({"cell_type": ["B", "T", "B", "T", "NK"], "n": range(5)}, index=[f"c{i}" for i in range(5)])
    counts = sp.csr_matrix(rng.poisson(2.0, (5, 4)).astype(np.float32))
    return anndata.AnnData(counts, obs=obs, var=pd.DataFrame(index=list("wxyz")))


def read(source) -> anndata.AnnData:
    return anndata.read_h5ad(source.address)


def test_a_path_or_an_address_is_taken_as_it_is(tmp_path):
    assert source_of("s3://bucket/soma", tmp_path, layer="raw").address == "s3://bucket/soma"
    assert source_of(tmp_path / "a.h5ad", tmp_path, layer="counts").layer == "counts"
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("form", ["csr", "csc", "dense", "integers", "view"])
def test_counts_of_any_form_are_written_once(cells, tmp_path, form):
    plain = cells.X.toarray()
    given = cells
    if form == "csc":
        given.X = cells.X.tocsc()
    elif form == "dense":
        given.X = plain
    elif form == "integers":
        given.X = sp.csr_matrix(plain.astype(np.int64))
    elif form == "view":
        given, plain = cells[[4, 0], :], plain[[4, 0]]
    source = source_of(given, tmp_path, layer=None)
    np.testing.assert_array_equal(read(source).X.toarray(), plain)
    assert list(read(source).obs["cell_type"]) == list(given.obs["cell_type"])
    before = {p: p.stat().st_mtime_ns for p in tmp_path.iterdir()}
    assert source_of(given, tmp_path, layer=None) == source
    assert {p: p.stat().st_mtime_ns for p in tmp_path.iterdir()} == before


def test_other_cells_or_other_labels_are_another_file(cells, tmp_path):
    first = source_of(cells, tmp_path, layer=None)
    cells.obs["cell_type"] = cells.obs["cell_type"].replace("NK", "B")
    second = source_of(cells, tmp_path, layer=None)
    cells.X[0, 0] += 1
    assert len({first.address, second.address, source_of(cells, tmp_path, layer=None).address}) == 3


def test_cells_on_disk_are_read_where_they_are(cells, tmp_path):
    cells.write_h5ad(tmp_path / "here.h5ad")
    backed = anndata.read_h5ad(tmp_path / "here.h5ad", backed="r")
    assert source_of(backed, tmp_path / "out", layer="counts").address == str(tmp_path / "here.h5ad")
    some = source_of(backed[:2], tmp_path / "out", layer=None)
    assert read(some).n_obs == 2


def test_counts_are_found_beside_normalised_values_and_the_choice_is_said(cells, tmp_path):
    counts = cells.X.toarray()
    cells.layers["counts"], cells.X = cells.X.copy(), np.log1p(counts)
    source = source_of(cells, tmp_path, layer=None)
    np.testing.assert_array_equal(read(source).X.toarray(), counts)
    assert "counts are those of layers['counts']: of X," in source.notes[0]
    del cells.layers["counts"]
    cells.raw = anndata.AnnData(sp.csr_matrix(counts), obs=cells.obs, var=cells.var)
    for layer in (None, "raw"):
        np.testing.assert_array_equal(read(source_of(cells, tmp_path, layer=layer)).X.toarray(), counts)


def test_cells_without_counts_are_refused_with_all_places_that_were_looked_at(cells, tmp_path):
    cells.X = np.log1p(cells.X.toarray())
    cells.layers["scaled"] = cells.X - 1.0
    with pytest.raises(InputError, match=r"of X, .* no raw counts.* no layer holds counts \(layers: scaled; no raw\)"):
        source_of(cells, tmp_path, layer=None)
    with pytest.raises(InputError, match=r"cells\.layers\['scaled'\]: .* no raw counts"):
        source_of(cells, tmp_path, layer="scaled")
    with pytest.raises(InputError, match="layer is 'raw', and there is no raw"):
        source_of(cells, tmp_path, layer="raw")
    assert not list(tmp_path.iterdir()), "nothing is half there"


def test_columns_that_no_file_can_hold_are_left_out_by_name(cells, tmp_path):
    cells.obs["mixed"] = [1, "two", 3.0, None, ("x",)]
    cells.obs["some"] = ["a", None, "b", None, "a"]
    source = source_of(cells, tmp_path, layer=None)
    assert list(source.notes) == ["obs columns of mixed types are left out: mixed"]
    assert read(source).obs["some"].isna().tolist() == [False, True, False, True, False]


@pytest.mark.parametrize("wrong", [None, 5, [1, 2], pd.DataFrame({"a": [1]})])
def test_what_is_no_cells_is_refused_by_its_type(wrong, tmp_path):
    with pytest.raises(InputError, match=f"cells must be an AnnData, .* got {type(wrong).__name__}"):
        source_of(wrong, tmp_path, layer=None)
