"""The SOMA store gives back what was written, in the order asked for."""

import pickle

import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp

from pipeline.data.soma.store import SomaStore
from pipeline.data.soma.write import write_experiment
from scldm.errors import InputError

N, G = 700, 40


@pytest.fixture(scope="module")
def counts():
    rng = np.random.default_rng(0)
    return sp.random(N, G, 0.2, format="csr", random_state=0, data_rvs=lambda n: rng.integers(1, 9, n)).astype(
        np.float32
    )


def tables():
    obs = pd.DataFrame({"cell_type": pd.Categorical((["a", "b", None] * N)[:N]), "is_primary_data": True})
    var = pd.DataFrame({"feature_id": [f"g{i}" for i in range(G)], "feature_name": "x", "feature_length": 0})
    return obs, var


@pytest.fixture(scope="module")
def store(tmp_path_factory, counts):
    folder = tmp_path_factory.mktemp("store") / "soma"
    return write_experiment(folder, *tables(), [counts[:300], counts[300:]], tile=64)


def dense(rows, n_genes=G):
    return sp.csr_matrix((rows.counts, rows.genes, rows.indptr), shape=(len(rows.indptr) - 1, n_genes)).toarray()


def test_rows_come_in_the_order_of_the_ids(store, counts):
    rng = np.random.default_rng(1)
    for ids in (np.arange(N), rng.permutation(N), rng.choice(N, 50, replace=False), np.array([699, 0, 65, 64])):
        np.testing.assert_array_equal(dense(store.read_ragged(ids)), counts[ids].toarray())


def test_repeated_ids_give_repeated_rows(store, counts):
    ids = np.array([5, 600, 5, 5, 2])
    np.testing.assert_array_equal(dense(store.read_ragged(ids)), counts[ids].toarray())


def test_genes_outside_the_vocabulary_are_dropped(store, counts):
    lut = np.full(G, -1, dtype=np.int32)
    lut[[7, 3, 20]] = [0, 1, 2]
    np.testing.assert_array_equal(dense(store.read_ragged(np.arange(9), lut), 3), counts[:9, [7, 3, 20]].toarray())


def test_sums_are_stored_like_in_the_census(store, counts):
    obs, var = store.obs(), store.var()
    np.testing.assert_array_equal(obs["raw_sum"], np.asarray(counts.sum(1)).ravel())
    np.testing.assert_array_equal(obs["nnz"], np.diff(counts.indptr))
    np.testing.assert_array_equal(var["nnz"], np.asarray((counts > 0).sum(0)).ravel())
    assert obs["cell_type"].isna().sum() == N // 3
    assert store.tile == 64


def test_filters_select_and_their_mistakes_are_explained(store):
    assert set(store.obs(["cell_type"], "cell_type == 'a'")["cell_type"]) == {"a"}
    with pytest.raises(InputError, match=r"ingest.obs_filter .*cannot be applied.*columns: soma_joinid, cell_type"):
        store.obs(value_filter="celltype == 'a'")


def test_a_failed_write_leaves_nothing(tmp_path, counts):
    def breaks():
        yield counts[:300]
        raise RuntimeError("disk on fire")

    with pytest.raises(RuntimeError, match="disk on fire"):
        write_experiment(tmp_path / "soma", *tables(), breaks())
    assert list(tmp_path.iterdir()) == []


def test_a_store_is_plain_data(store):
    store.read_ragged(np.arange(3))
    assert len(pickle.dumps(SomaStore(store.uri))) < 500
    assert pickle.loads(pickle.dumps(store)) == store


def test_what_is_not_an_experiment_is_explained(tmp_path):
    with pytest.raises(InputError, match="cannot open"):
        _ = SomaStore(str(tmp_path / "nothing")).shape
