"""The same cell twice is found by its counts, said with numbers, and never on two sides of the split."""

from __future__ import annotations

from dataclasses import replace

import anndata
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp
import tiledbsoma as soma

from pipeline.config.context import StageContext
from pipeline.config.job import IngestConfig, SplitConfig
from pipeline.config.resources import ResourcesConfig
from pipeline.data.entries import CountEntries
from pipeline.data.ingest import copies as module
from pipeline.data.ingest.copies import Copies, find_copies, keep_together
from pipeline.data.ingest.split import require_splits, split_cells
from pipeline.data.inspection.examine import Question, examine
from pipeline.data.soma.write import write_experiment
from pipeline.data.validation.cell_hashes import COLUMNS, MIN_GENES, CellHashes, first_of_each
from pipeline.stages import ingest
from pipeline.tracking.tracker import NullTracker
from scldm.errors import InputError

N, G = 60, 40
GENES = [f"ENSG{i:011d}" for i in range(G)]


def counts(n: int = N, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).poisson(1.0, (n, G)).astype(np.float32)


def hashes_of(x: np.ndarray, genes=None, order=None) -> np.ndarray:
    coo = sp.coo_matrix(x)
    order = np.arange(coo.nnz) if order is None else order
    found = CellHashes(len(x), genes)
    for part in np.array_split(order, 3):  # cells arrive in pieces
        found.add(CountEntries(coo.row[part], coo.col[part], coo.data[part]))
    return found.values


def store_of(folder, x: np.ndarray, names: list[str] | None = None):
    obs = pd.DataFrame({"obs_id": [f"c{i}" for i in range(len(x))], "dataset_id": names or ["d"] * len(x)})
    var = pd.DataFrame({"feature_id": GENES, "feature_name": GENES, "feature_length": 0})
    return write_experiment(folder / "soma", obs, var, [sp.csr_matrix(x)])


def write(path, x: np.ndarray, genes=GENES, **obs) -> None:
    table = pd.DataFrame(obs, index=[f"c{i}" for i in range(len(x))])
    anndata.AnnData(sp.csr_matrix(x), table, pd.DataFrame(index=genes)).write_h5ad(path)


# ---- hashes ------------------------------------------------------------------------------------------------------
def test_a_hash_does_not_depend_on_the_order_or_the_pieces():
    x = counts()
    order = np.random.default_rng(1).permutation(int((x > 0).sum()))
    np.testing.assert_array_equal(hashes_of(x), hashes_of(x, order=order))


def test_a_hash_does_not_depend_on_the_order_of_the_genes_of_a_file():
    x = counts()
    versions = [f"{g}.7" for g in GENES]  # the version of an Ensembl id does not count
    np.testing.assert_array_equal(hashes_of(x, GENES), hashes_of(x[:, ::-1], versions[::-1]))


def test_one_count_more_or_in_another_gene_is_another_hash():
    x = counts(3)
    x[1], x[2] = x[0], x[0]
    x[1, 0] += 1
    x[2, [0, 1]] = x[0, [1, 0]] + [0, 5]
    assert len(np.unique(hashes_of(x), axis=0)) == 3


def test_a_stored_zero_is_no_count():
    with_zero = CellHashes(1)
    with_zero.add(CountEntries(np.array([0, 0]), np.array([3, 4]), np.array([2.0, 0.0])))
    without = CellHashes(1)
    without.add(CountEntries(np.array([0]), np.array([3]), np.array([2])))
    np.testing.assert_array_equal(with_zero.values, without.values)


def test_the_first_of_each_cell_is_found():
    hashes = np.array([[5, 1], [5, 2], [5, 1], [0, 0], [5, 2], [5, 1]], np.uint64)
    assert first_of_each(hashes).tolist() == [0, 1, 0, 3, 1, 0]
    assert first_of_each(np.zeros((0, 2), np.uint64)).tolist() == []


# ---- ingest ------------------------------------------------------------------------------------------------------
def test_copies_are_counted_with_their_data_sets(tmp_path):
    x = counts()
    store = store_of(tmp_path, np.concatenate([x, x[:20]]), ["a"] * N + ["b"] * 20)
    notes: list[str] = []
    copies = find_copies(store, store.obs([]), notes)
    assert copies.n == 20
    assert "20 of 80 cells have exactly the counts of an earlier cell (20 in a and b)" in notes[0]
    assert copies.first[N:].tolist() == list(range(20))


def test_copies_are_found_in_an_experiment_that_records_no_hashes(tmp_path):
    x = counts()
    store = store_of(tmp_path, np.concatenate([x, x[:20]]))
    recorded = find_copies(store, store.obs([]), [])
    with soma.DataFrame.open(f"{store.uri}/obs") as obs:
        frame = obs.read().concat().to_pandas()
    read = module.hashes_of(store, frame["soma_joinid"].to_numpy())
    np.testing.assert_array_equal(read[0].view(np.int64), frame[list(COLUMNS)].to_numpy())
    np.testing.assert_array_equal(Copies.of(*read).first, recorded.first)


def test_only_cells_of_the_job_are_compared(tmp_path):
    x = counts()
    store = store_of(tmp_path, np.concatenate([x, x]))
    cells = store.obs([]).iloc[N:]
    assert find_copies(store, cells, notes := []).n == 0
    assert notes == []


def test_cells_of_few_genes_are_not_called_copies():
    x = np.zeros((4, G), np.float32)
    x[:2, : MIN_GENES - 1] = 1
    x[2:, :MIN_GENES] = 1
    copies = Copies.of(hashes_of(x), (x > 0).sum(1))
    assert copies.n == 1
    assert copies.first.tolist() == [0, 0, 2, 2]


def test_without_copies_the_split_is_what_it_was():
    cells = pd.DataFrame({"soma_joinid": np.arange(5000), "donor_id": [f"D{i % 50}" for i in range(5000)]})
    for by in ("cell", "tile", "donor_id"):
        config = SplitConfig(by=by)
        np.testing.assert_array_equal(
            split_cells(cells, config, tile=64), split_cells(cells, config, tile=64, copies=Copies.none(5000))
        )


@pytest.mark.parametrize("by", ["cell", "tile", "donor_id", "dataset_id"])
def test_copies_are_on_one_side_however_the_split_is_made(by):
    n = 4000
    first = np.r_[np.arange(n), np.arange(n)]
    labels = [f"{i // 20}" for i in range(n)] + [f"copy {i // 20}" for i in range(n)]
    cells = pd.DataFrame({"soma_joinid": np.arange(2 * n), "donor_id": labels, "dataset_id": labels})
    split = split_cells(cells, SplitConfig(by=by), tile=64, copies=Copies(first, first))
    assert (split[:n] == split[n:]).all()
    assert set(split) == {"train", "validation", "test"}
    if by in cells:
        assert cells.assign(split=split).groupby(by)["split"].nunique().max() == 1


def test_a_donor_is_whole_even_if_its_cells_agree_with_others_by_chance():
    n = 4000
    cells = pd.DataFrame({"soma_joinid": np.arange(n), "donor_id": [f"D{i // 20}" for i in range(n)]})
    chance = Copies(np.zeros(n, int), np.arange(n))
    alone = split_cells(cells, SplitConfig(by="donor_id"))
    np.testing.assert_array_equal(split_cells(cells, SplitConfig(by="donor_id"), copies=chance), alone)


def test_a_copy_of_a_held_out_cell_is_held_out_too():
    first = np.array([0, 1, 2, 0, 4, 2])
    split = np.array(["train", "train", "train", "test", "train", "train"])
    held_out = np.array([False, False, False, True, False, False])
    together = keep_together(split, Copies(first, first), held_out)
    assert together.tolist() == ["test", "train", "train", "test", "train", "train"]


@pytest.mark.parametrize("split", [{}, {"by": "tile"}, {"held_out": {"combinations": [{"cell_type": "T"}]}}])
@pytest.mark.parametrize("place", ["files", "experiment"])
def test_no_cell_of_an_ingest_has_its_copy_on_another_side(tmp_path, place, split):
    """300 cells, which two files hold in common; the second calls half of them T."""
    x = counts(300)
    write(tmp_path / "a.h5ad", x, cell_type="B")
    write(tmp_path / "b.h5ad", x, cell_type=["T", "B"] * 150)
    context = StageContext(tmp_path, {}, seed=0, resources=ResourcesConfig(), tracker=NullTracker())
    source = {"type": "h5ad", "path": str(tmp_path / "*.h5ad")}
    if place == "experiment":
        ingest.run(IngestConfig.model_validate({"source": source, "split": {"validation": 0.2}}), context)
        source = {"type": "soma", "uri": str(tmp_path / "soma")}
        (again := tmp_path / "again").mkdir()
        context = replace(context, folder=again)
    if split.get("by") == "tile":  # all these cells are in one tile
        split = {**split, "validation": 0, "test": 0}
    facts = ingest.run(IngestConfig.model_validate({"source": source, "split": split}), context)
    cells = pd.read_parquet(context.folder / "cells.parquet")["split"].astype(str).to_numpy()
    assert facts["copied_cells"] == 300
    assert any(
        "300 of 600 cells have exactly the counts of an earlier cell (300 in a and b)" in x for x in facts["notes"]
    )
    assert (cells[:300] == cells[300:]).all()
    if "held_out" in split:
        assert (cells[300::2] == "test").all()
        assert facts["n_cells"]["test"] == 300


# ---- validate-data -----------------------------------------------------------------------------------------------
def test_validation_says_how_many_cells_of_a_file_are_copies(tmp_path):
    x = counts()
    write(tmp_path / "twice.h5ad", np.concatenate([x, x]))
    (found,) = examine(Question(str(tmp_path / "twice.h5ad")))
    assert not found.errors
    (copies,) = [f for f in found.findings if "earlier cell" in f.what]
    assert copies.what == "60 of 120 cells have exactly the counts of an earlier cell"
    assert copies.first[0] == "cell c60 is cell c0"


def test_validation_compares_the_cells_of_all_files(tmp_path):
    x = counts()
    write(tmp_path / "a.h5ad", x)
    write(tmp_path / "b.h5ad", np.concatenate([counts(seed=1), x[:25]])[:, ::-1], GENES[::-1])
    *alone, together = examine(Question(str(tmp_path)))
    assert not any("earlier cell" in f.what for found in alone for f in found.findings)
    (shared,) = [f for f in together.findings if "more than one file" in f.what]
    assert shared.what == "25 of 145 cells are in more than one file, with exactly the same counts"
    assert shared.first == ("25 of b are in a",)
    assert "cell_hashes" not in together.to_json()


def test_different_cells_and_empty_cells_are_no_copies(tmp_path):
    x = counts()
    x[50:] = 0
    write(tmp_path / "a.h5ad", x)
    (found,) = examine(Question(str(tmp_path / "a.h5ad")))
    assert not any("earlier cell" in f.what for f in found.findings)


# ---- copies of a few cells -----------------------------------------------------------------------------------------
@pytest.mark.parametrize(("n_different", "words"), [(1, "1 different one,"), (2, "2 different ones,")])
def test_copies_of_so_few_cells_that_no_split_is_possible_are_refused_with_their_number(n_different, words, tmp_path):
    write(tmp_path / "a.h5ad", np.tile(counts()[:n_different], (N // n_different, 1)))
    [found] = examine(Question(str(tmp_path / "a.h5ad")))
    assert [f.what for f in found.findings if "different" in f.what] == [
        f"all 60 cells are copies of {words} and copies share a side of the split"
    ]
    config = IngestConfig.model_validate({"source": {"type": "h5ad", "path": str(tmp_path / "a.h5ad")}, "labels": []})
    context = StageContext(tmp_path / "made", {}, 0, ResourcesConfig(), NullTracker())
    with pytest.raises(
        InputError, match=f"no cell fell into .*: all 60 cells are copies of {words} .* see how the cel"
    ):
        ingest.run(config, context)


def test_a_few_more_different_cells_are_said_where_a_side_is_empty():
    first = np.arange(N) % 5
    obs = pd.DataFrame({"soma_joinid": np.arange(N)})
    with pytest.raises(InputError, match="all 60 cells are copies of 5 different ones"):
        require_splits(SplitConfig(), np.full(N, "train"), obs, Copies(first, first))
    with pytest.raises(InputError, match=r"\(60 cells\); raise ingest.split.validation"):
        require_splits(SplitConfig(), np.full(N, "train"), obs, Copies.none(N))
