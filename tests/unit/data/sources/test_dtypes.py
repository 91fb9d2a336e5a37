"""Every type of values that an `.h5ad` file can hold is read, or widened to one that the store has."""

import h5py
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp
from helpers.files.h5ad_cases import N, counts, save

from pipeline.config.job import IngestConfig
from pipeline.data.sources.open import open_source
from scldm.data.class_names import class_names

WHOLE = ["int8", "uint8", "int16", "uint16", "int32", "uint32", "int64", "uint64", "float16", "float32", "float64"]


def stored(tmp_path, **source):
    config = IngestConfig.model_validate({"source": {"type": "h5ad", "path": str(tmp_path / "c.h5ad"), **source}})
    store = open_source(config, tmp_path, ["cell_type"]).store
    rows = store.read_ragged(np.arange(N))
    return store, sp.csr_matrix((rows.counts, rows.genes, rows.indptr), shape=(N, 6)).toarray()


@pytest.mark.parametrize("kind", ["dense", "csr", "csc"])
@pytest.mark.parametrize("dtype", [*WHOLE, ">f4", ">i4", "bool"])
def test_counts_of_every_type_are_read(tmp_path, dtype, kind):
    expected = (counts() > 1 if dtype == "bool" else counts()).astype(np.float32)
    x = expected if kind == "dense" else {"csr": sp.csr_matrix, "csc": sp.csc_matrix}[kind](expected)
    save(tmp_path / "c.h5ad", x)
    with h5py.File(tmp_path / "c.h5ad", "r+") as file:  # as other programs write it: scipy has no 16-bit floats
        place, name = (file, "X") if kind == "dense" else (file["X"], "data")
        attributes, values = dict(place[name].attrs), place[name][:].astype(dtype)
        del place[name]
        place[name] = values
        place[name].attrs.update(attributes)
    assert (stored(tmp_path)[1] == expected).all()


@pytest.mark.parametrize("dtype", ["float16", "float32", "longdouble", "int8", "uint64", "bool", "complex64"])
def test_obs_columns_of_every_type_are_stored(tmp_path, dtype):
    values = (np.arange(N) % 2).astype(dtype)
    save(tmp_path / "c.h5ad", score=values)
    store, _ = stored(tmp_path)
    read = store.obs(["score"])["score"]
    assert [complex(x) for x in read] == [complex(x) for x in values]


def test_a_column_without_any_value_is_stored_as_missing(tmp_path):
    save(tmp_path / "c.h5ad", empty=pd.Categorical([np.nan] * N, categories=[]))
    store, _ = stored(tmp_path)
    assert store.obs(["empty"])["empty"].isna().all()


def test_16_bit_floats_keep_their_digits(tmp_path):
    doses = np.resize(np.array([0.1, 0.3, np.nan], "float16"), N)
    save(tmp_path / "c.h5ad", dose=doses)
    store, _ = stored(tmp_path)
    read = store.obs(["dose"])["dose"]
    assert list(class_names(read)[:3]) == list(class_names(doses)[:3]) == ["0.1", "0.3", None]
