"""Old cells among the training cells: which they are, what is read of them, and what they stay out of."""

from __future__ import annotations

import json
from types import SimpleNamespace

import anndata
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp
from pydantic import ValidationError

from pipeline.config.context import StageContext
from pipeline.config.ingest import ReplayConfig
from pipeline.config.input_paths import input_contents
from pipeline.config.job import IngestConfig
from pipeline.core.manifest import Manifest, write_manifest
from pipeline.data.ingest.dataset import IngestedDataset
from pipeline.data.loading.blocks import LABEL
from pipeline.data.loading.order import FeedOrder
from pipeline.data.presence import GROUP
from pipeline.stages import ingest
from scldm.errors import InputError

GENES = [f"ENSG{i:011d}" for i in range(14)]
OLD_GENES, NEW_GENES = GENES[:12], GENES[1:]  # the old cells lack the last two, the new ones the first


def write(path, genes, seed, n, **obs):
    """Counts of about 20 at every gene, so that no two cells are the same by chance."""
    counts = np.random.default_rng(seed).poisson(20, (n, len(genes))).astype(np.float32)
    table = pd.DataFrame({k: np.resize(np.array(v), n) for k, v in obs.items()})
    table.index = [f"{path.stem}{i}" for i in range(n)]
    cells = anndata.AnnData(sp.csr_matrix(counts), obs=table, var=pd.DataFrame(index=genes))
    cells.write_h5ad(path)
    return cells


def run(folder, **config):
    folder.mkdir(parents=True, exist_ok=True)
    output = folder.parents[2] if len(folder.parts) > 4 else None
    context = StageContext(folder, {}, 0, SimpleNamespace(), None, output=output)
    facts = ingest.run(IngestConfig.model_validate(config), context)
    return IngestedDataset.open(Manifest("ingest", folder.name, str(folder), {}, {}, facts, 0.0, 1.0))


@pytest.fixture
def files(tmp_path):
    return SimpleNamespace(
        old=write(tmp_path / "old.h5ad", OLD_GENES, 1, 200, cell_type=["A", "B"], dose=[1.0, 2.0]),
        new=write(tmp_path / "new.h5ad", NEW_GENES, 2, 100, cell_type=["B", "C"], donor=["x", "y", "z"]),
    )


@pytest.fixture
def census(tmp_path, files):
    """The finished ingest of the pipeline runs/census."""
    data = run(tmp_path / "runs/census/ingest/v1", source=h5ad(tmp_path / "old.h5ad"))
    facts = dict(data.facts)
    write_manifest(Manifest("ingest", "v1", str(data.folder), {}, {}, facts, 0.0, 1.0))
    return data


def h5ad(path):
    return {"type": "h5ad", "path": str(path)}


def mixed(tmp_path, name="v1", labels=("cell_type", "donor"), **replay):
    replay = {"share": 0.25, **(replay or {"pipeline": str(tmp_path / "runs/census")})}
    folder = tmp_path / f"runs/mine/ingest/{name}"
    return run(folder, source=h5ad(tmp_path / "new.h5ad"), labels=list(labels), replay=replay)


def old_rows(data):
    return data.cells[data.cells["replayed"].to_numpy()]


def test_the_share_of_the_training_cells_are_old_cells_and_all_of_them_were_trained_on(tmp_path, census):
    data = mixed(tmp_path)
    old = old_rows(data)
    n_new = len(data.cells_of("train"))
    assert len(old) == round(n_new / 3)
    assert set(old["split"]) == {"train"}
    assert data.n_cells["train"] == n_new + len(old) == len(data.blocks("train").ids)
    ids = old["soma_joinid"] - data.facts["replay"]["start"]
    assert set(ids) <= set(census.cells_of("train")["soma_joinid"])  # none that was held out
    assert data.facts["replay"]["n_cells"] == len(old)


def test_counts_of_old_and_new_cells_are_read_in_any_order_as_they_are_in_their_files(tmp_path, files, census):
    data = mixed(tmp_path)
    source = data.blocks("train")
    ids = np.random.default_rng(0).permutation(source.ids)
    table = source.read(ids)
    start = data.facts["replay"]["start"]
    for row in table.to_pylist():
        old = row["soma_joinid"] >= start
        cells, at = (files.old, row["soma_joinid"] - start) if old else (files.new, row["soma_joinid"])
        expected = pd.Series(cells.X[at].toarray()[0], index=cells.var_names).reindex(NEW_GENES, fill_value=0.0)
        found = np.zeros(len(NEW_GENES))
        found[row["gene"]] = row["count"]
        assert (found == expected.to_numpy()).all()
        assert row["library_size"] == expected.sum()
    assert table["soma_joinid"].to_pylist() == ids.tolist()


def test_old_classes_are_kept_and_a_label_that_old_cells_lack_is_the_null_class(tmp_path, census):
    data = mixed(tmp_path)
    assert data.vocabulary.label("cell_type").classes == ("A", "B", "C")
    old, donor = old_rows(data), data.vocabulary.label("donor")
    assert set(old[LABEL + "cell_type"]) == {0, 1}
    assert set(old[LABEL + "donor"]) == {donor.null_id}
    codes = data.blocks("train").read(old["soma_joinid"].to_numpy())[LABEL + "donor"].to_pylist()
    assert set(codes) == {donor.null_id}
    assert any("have no donor" in note for note in data.facts["notes"])


def test_a_gene_that_old_cells_did_not_measure_is_no_zero_in_them(tmp_path, census):
    data = mixed(tmp_path)
    known = data.measured[data.cells[LABEL + GROUP].to_numpy()]
    old = data.cells["replayed"].to_numpy()
    lacking = np.array([g not in OLD_GENES for g in NEW_GENES])
    assert (known[old] == ~lacking).all()
    assert known[~old].all()


def test_statistics_and_composition_are_those_of_the_new_cells(tmp_path, census):
    data = mixed(tmp_path)
    alone = run(tmp_path / "alone", source=h5ad(tmp_path / "new.h5ad"), labels=["cell_type", "donor"])
    pd.testing.assert_frame_equal(data.gene_stats, alone.gene_stats)
    pd.testing.assert_frame_equal(data.composition("train"), alone.composition("train"))
    assert data.facts["label_counts"] == alone.facts["label_counts"]
    assert (data.anndata("train").X != alone.anndata("train").X).nnz == 0
    sizes = data.library_sizes.table
    assert {k: v for k, v in sizes.items() if k in alone.library_sizes.table} == alone.library_sizes.table
    a = old_rows(data)
    a = np.log(a["library_size"][a[LABEL + "cell_type"] == 0].astype(float))
    assert sizes["cell_type=A"].mean == pytest.approx(a.mean(), rel=1e-6)  # a class of old cells alone has its own
    assert sizes["cell_type=A"].n_cells == len(a)


def test_the_same_seed_takes_the_same_cells_and_another_one_others(tmp_path, census):
    place = {"pipeline": str(tmp_path / "runs/census")}
    one, same, other = (mixed(tmp_path, name, **place, seed=s) for name, s in (("a", 0), ("b", 0), ("c", 1)))
    assert one.facts["digest"] == same.facts["digest"] != other.facts["digest"]
    assert (one.cells["soma_joinid"] == same.cells["soma_joinid"]).all()
    order = [
        np.concatenate([FeedOrder(d.blocks("train").ids, 2048, 0, 16, 4, 64).block(0, 0, lane)[0] for lane in range(4)])
        for d in (one, same)
    ]
    assert (order[0] == order[1]).all()


def test_every_step_mixes_old_and_new_cells(tmp_path, census):
    data = mixed(tmp_path)
    order = FeedOrder(data.blocks("train").ids, 2048, 0, 16, 4, 64)
    start = data.facts["replay"]["start"]
    rows = np.stack([order.block(0, 0, lane)[0] for lane in range(4)])  # (lanes, rows)
    n_old = [(rows[:, k : k + 4] >= start).sum() for k in range(0, rows.shape[1] - 4, 4)]
    assert min(n_old) > 0
    assert np.mean(n_old) == pytest.approx(4, abs=1)


def test_outputs_can_be_moved_as_a_whole(tmp_path, census):
    data = mixed(tmp_path)
    (tmp_path / "runs").rename(tmp_path / "elsewhere")
    moved = IngestedDataset(tmp_path / "elsewhere/mine/ingest/v1", data.facts)
    assert len(moved.blocks("train").read(moved.blocks("train").ids)) == data.n_cells["train"]


def test_cells_of_a_source_are_taken_by_its_conditions(tmp_path, files):
    where = {"where": {"cell_type": "A"}}
    data = mixed(tmp_path, source=h5ad(tmp_path / "old.h5ad"), cells=where)
    assert set(old_rows(data)[LABEL + "cell_type"]) == {0}
    assert data.vocabulary.label("cell_type").classes == ("A", "B", "C")


def test_a_label_that_a_file_lacks_is_null_also_if_it_is_one_of_the_census(tmp_path, files):
    """Such columns are written as "unknown"."""
    write(tmp_path / "new.h5ad", NEW_GENES, 3, 100, cell_type=["B", "C"], donor_id=["x", "y"])
    data = mixed(tmp_path, source=h5ad(tmp_path / "old.h5ad"), labels=("cell_type", "donor_id"))
    assert data.vocabulary.label("donor_id").classes == ("x", "y")
    assert set(old_rows(data)[LABEL + "donor_id"]) == {2}


def test_the_cache_holds_old_cells_too(tmp_path, census):
    streamed = mixed(tmp_path)
    replay = {"pipeline": str(tmp_path / "runs/census"), "share": 0.25}
    cached = run(
        tmp_path / "runs/mine/ingest/cached", source=h5ad(tmp_path / "new.h5ad"), labels=["cell_type", "donor"],
        replay=replay, cache=str(tmp_path / "cache"),
    )  # fmt: skip
    ids = streamed.blocks("train").ids
    assert cached.blocks("train").read(ids).equals(streamed.blocks("train").read(ids))


def test_an_old_cell_that_is_a_held_out_cell_is_not_trained_on(tmp_path, files):
    """The old data hold the new cells too: half of what is drawn may be in a held-out split."""
    data = mixed(tmp_path, source=h5ad(tmp_path / "new.h5ad"), share=0.5, labels=("cell_type",))
    held_out = data.cells[data.cells["split"] != "train"]["soma_joinid"]
    ids = old_rows(data)["soma_joinid"] - data.facts["replay"]["start"]
    assert not set(ids) & set(held_out)
    assert any("have exactly the counts of a held-out cell" in note for note in data.facts["notes"])


def test_a_combination_that_is_held_out_is_not_replayed(tmp_path, files):
    split = {"held_out": {"combinations": [{"cell_type": "B", "dose": 1.0}]}, "validation": 0.1}
    write(tmp_path / "new.h5ad", NEW_GENES, 3, 100, cell_type=["B", "C"], dose=[1.0, 1.0, 2.0, 2.0])
    write(tmp_path / "old.h5ad", OLD_GENES, 4, 200, cell_type=["B", "C"], dose=[1.0, 1.0, 2.0, 2.0])
    data = run(
        tmp_path / "stage", source=h5ad(tmp_path / "new.h5ad"), labels=["cell_type", "dose"], split=split,
        replay={"source": h5ad(tmp_path / "old.h5ad"), "share": 0.4},
    )  # fmt: skip
    old = old_rows(data)
    combinations = set(zip(old[LABEL + "cell_type"], old[LABEL + "dose"], strict=True))
    assert combinations == {(0, 1), (1, 0), (1, 1)}


# ---- bad input ---------------------------------------------------------------------------------------------------
def test_more_old_cells_than_there_are_is_an_error_that_says_how_many_would_do(tmp_path, census):
    with pytest.raises(
        InputError, match=r"share \(0.8\) takes 3\d\d old cells beside \d+ new .* at most ingest.replay.share=(0\.\d+)"
    ) as e:
        mixed(tmp_path, pipeline=str(tmp_path / "runs/census"), share=0.8)
    most = float(str(e.value).rpartition("=")[2])
    assert mixed(tmp_path, "again", pipeline=str(tmp_path / "runs/census"), share=most).n_cells["train"]


def test_old_cells_of_another_organism_are_refused(tmp_path, files):
    write(tmp_path / "mouse.h5ad", [f"ENSMUSG{i:011d}" for i in range(12)], 5, 100, cell_type=["A"])
    with pytest.raises(InputError, match=r"none of the 13 genes is in the .*mouse\.h5ad.*check the organism"):
        mixed(tmp_path, source=h5ad(tmp_path / "mouse.h5ad"))


def test_old_classes_that_are_no_values_of_the_label_are_refused(tmp_path, files):
    write(tmp_path / "old.h5ad", OLD_GENES, 4, 200, cell_type=["A"], dose=["high", "low"])
    write(tmp_path / "new.h5ad", NEW_GENES, 3, 100, cell_type=["B"], dose=[1.0, 2.0])
    with pytest.raises(InputError, match="old cells have the dose 'high', and dose is float64 in the new cells"):
        mixed(tmp_path, source=h5ad(tmp_path / "old.h5ad"), labels=("cell_type", "dose"))


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({}, "old cells come from one of pipeline .* got none"),
        ({"pipeline": "runs/a", "model": "runs/b"}, "got pipeline and model"),
        ({"pipeline": "runs/a", "cells": {"tissue": "lung"}}, "cells chooses cells of source"),
        ({"pipeline": "runs/a", "share": 1}, "less than 1"),
    ],
)
def test_settings_that_contradict_each_other_are_refused(given, words):
    with pytest.raises(ValidationError, match=words):
        ReplayConfig.model_validate(given)


def test_a_pipeline_is_named_by_its_folder_its_ingest_or_a_version(tmp_path, census):
    def content(place):
        given = {"source": {"type": "synthetic"}, "replay": {"pipeline": str(tmp_path / place)}}
        return input_contents(IngestConfig.model_validate(given))["replay.pipeline"].digest

    assert content("runs/census") == content("runs/census/ingest") == content("runs/census/ingest/v1")
    with pytest.raises(InputError, match="no such file; expected the folder of a pipeline"):
        content("runs/nothing")
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match="empty has no finished ingest; name the folder of a pipeline"):
        content("empty")


def test_old_and_new_files_are_both_part_of_the_version(tmp_path, files):
    given = {"source": h5ad(tmp_path / "new.h5ad"), "replay": {"source": h5ad(tmp_path / "old.h5ad")}}
    contents = input_contents(IngestConfig.model_validate(given))
    assert set(contents) == {"source", "replay.source.path"}
    assert contents["source"].digest != contents["replay.source.path"].digest


def test_without_old_cells_the_settings_are_as_they_were():
    plain = IngestConfig.model_validate({"source": {"type": "synthetic"}}).model_dump(mode="json")
    assert "replay" not in json.dumps(plain)
