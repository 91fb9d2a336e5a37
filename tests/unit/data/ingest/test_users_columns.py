"""Columns of a user's table never meet those that ingest works with, whatever they are called."""

from pathlib import Path
from types import SimpleNamespace

import anndata
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp

from pipeline.config.context import StageContext
from pipeline.config.job import IngestConfig
from pipeline.core.manifest import Manifest
from pipeline.data.ingest.dataset import IngestedDataset
from pipeline.data.presence import GROUP
from pipeline.data.tables import RESERVED
from pipeline.stages import ingest
from scldm.data.labels.reserved_names import GENERATED_COLUMNS, REQUEST_COLUMNS
from scldm.errors import InputError

N = 300
OWN = ["split", "n_expressed", "group", "content", "cell", "tile", "gene", "count", "weight"]
OTHERS = ["label:cell_type", "label:split", "index", "level_0", "n_counts", "keys", "type", "a.b", "a/b"]
WRITTEN = [*REQUEST_COLUMNS, *GENERATED_COLUMNS]
STORED = ["obs_id", "dataset_id", "is_primary_data", "soma_joinid", "soma_dim_0", *RESERVED, GROUP]


def ingested(folder: Path, obs: pd.DataFrame, **config):
    counts = np.random.default_rng(0).poisson(1.0, (N, 30)).astype(np.float32)
    var = pd.DataFrame(index=[f"ENSG{i:011d}" for i in range(30)])
    folder.mkdir(exist_ok=True)
    anndata.AnnData(sp.csr_matrix(counts), obs=obs, var=var).write_h5ad(folder / "cells.h5ad")
    given = {"source": {"type": "h5ad", "path": str(folder / "cells.h5ad")}, **config}
    context = StageContext(folder, {}, 0, SimpleNamespace(), None)
    facts = ingest.run(IngestConfig.model_validate(given), context)
    return facts, IngestedDataset.open(Manifest("ingest", "v", str(folder), {}, {}, facts, 0.0, 0.0)), counts


def users_table(names: list[str]) -> pd.DataFrame:
    """A class `a` to `c` in each column, drawn differently for each."""
    rng = np.random.default_rng(1)
    columns = {name: rng.choice(["a", "b", "c"], N) for name in names}
    return pd.DataFrame({"cell_type": rng.choice(["T", "B"], N), **columns}, index=[f"cell{i}" for i in range(N)])


def test_a_users_split_column_can_be_held_out_by(tmp_path):
    obs = users_table([])
    obs["split"] = np.where(np.arange(N) < 60, "test", np.where(np.arange(N) < 200, "train", "ood"))
    held_out = {"combinations": [{"split": "test"}]}
    facts, data, _ = ingested(tmp_path, obs, labels=["cell_type"], split={"validation": 0.1, "held_out": held_out})
    assert (data.cells["split"] == "test").to_numpy()[:60].all()
    assert not (data.cells["split"] == "test").to_numpy()[60:].any()
    assert facts["held_out"]["columns"] == ["split"]
    table = pd.read_parquet(tmp_path / facts["held_out"]["table"])
    assert table.to_dict("records") == [{"split": "test", "n_cells": 60, "label:split": "test"}]


def test_a_table_with_every_internal_name_changes_nothing(tmp_path):
    obs = users_table([*OWN, *OTHERS, *STORED, *WRITTEN])
    facts, data, counts = ingested(tmp_path / "all", obs, labels=["cell_type"])
    plain, plain_data, _ = ingested(tmp_path / "plain", obs[["cell_type"]], labels=["cell_type"])
    pd.testing.assert_frame_equal(data.cells, plain_data.cells)
    assert facts["n_cells"] == plain["n_cells"]
    assert facts["label_counts"] == plain["label_counts"]
    assert (data.cells["library_size"].to_numpy() == counts.sum(1)).all()


@pytest.mark.parametrize("name", [*OWN, *OTHERS, "dataset_id"])
def test_each_internal_name_can_be_a_users_label(tmp_path, name):
    obs = users_table([*OWN, *OTHERS, "dataset_id"])
    held_out = {"combinations": [{name: "c"}]}
    _, data, counts = ingested(tmp_path, obs, labels=["cell_type", name], split={"held_out": held_out})
    label = data.vocabulary.label(name)
    assert np.asarray(label.classes)[data.cells[f"label:{name}"]].tolist() == obs[name].tolist()
    assert ((data.cells["split"] == "test").to_numpy() == (obs[name] == "c").to_numpy()).all()
    assert (data.cells["library_size"].to_numpy() == counts.sum(1)).all()


@pytest.mark.parametrize("name", [*WRITTEN, "guidance.cell_type"])
def test_a_label_cannot_have_the_name_of_a_column_of_requests_or_generated_cells(name):
    with pytest.raises(ValueError, match=rf"{name}: requests or generated cells have columns of this name"):
        IngestConfig.model_validate({"source": {"type": "synthetic"}, "labels": ["cell_type", name]})


@pytest.mark.parametrize("name", ["soma_joinid", "raw_sum", "nnz", "counts_hash_0", GROUP])
def test_a_name_of_soma_is_refused_as_a_label_with_the_way_to_rename_it(tmp_path, name):
    other = f"my_{name.strip('_')}"
    with pytest.raises(InputError, match=rf"{name}.*ingest.source.columns: {{{other}: {name}}}"):
        ingested(tmp_path, users_table([name]), labels=["cell_type", name])


@pytest.mark.parametrize("name", ["soma_joinid", "raw_sum", "nnz", "counts_hash_0", GROUP])
def test_the_remedy_for_a_name_of_soma_works(tmp_path, name):
    obs, other = users_table([name]), f"my_{name.strip('_')}"
    given = {"source": {"type": "h5ad", "path": str(tmp_path / "cells.h5ad"), "columns": {other: name}}}
    _, data, _ = ingested(tmp_path, obs, labels=["cell_type", other], **given)
    label = data.vocabulary.label(other)
    assert np.asarray(label.classes)[data.cells[f"label:{other}"]].tolist() == obs[name].tolist()
