"""The ingest stage on tiny sources: facts, files, splits, and what it refuses."""

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from pipeline.config.context import StageContext
from pipeline.config.job import IngestConfig, SplitConfig
from pipeline.core.manifest import Manifest
from pipeline.data.ingest.dataset import IngestedDataset
from pipeline.data.ingest.split import split_cells
from pipeline.stages import ingest
from scldm.data.vocabulary import Vocabulary
from scldm.errors import InputError

SYNTHETIC = {"type": "synthetic", "n_cells": 400, "n_genes": 60, "n_types": 3}


def run(folder: Path, **config):
    folder.mkdir(exist_ok=True)
    context = StageContext(folder, {}, 0, SimpleNamespace(), None)
    facts = ingest.run(IngestConfig.model_validate({"source": SYNTHETIC, **config}), context)
    return facts, IngestedDataset.open(Manifest("ingest", "v", str(folder), {}, {}, facts, 0.0, 0.0))


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    return run(tmp_path_factory.mktemp("ingest"), labels=["cell_type", "tissue_general"])


def test_facts_describe_the_cells(done):
    facts, ingested = done
    assert sum(facts["n_cells"].values()) == 400
    assert min(facts["n_cells"].values()) > 20
    assert facts["n_classes"] == {"cell_type": 3, "tissue_general": 3}
    assert facts["soma_uri"] == "soma"
    assert ingested.vocabulary.n_genes == facts["n_genes"] == 60
    assert ingested.library_sizes.of({"cell_type": "classical monocyte"}).n_cells > 5


def test_statistics_equal_those_of_the_dense_matrix(done):
    facts, ingested = done
    x = ingested.anndata("train").X.toarray()
    stats = ingested.gene_stats
    np.testing.assert_allclose(stats["mean"], x.mean(0), rtol=1e-6)
    np.testing.assert_allclose(stats["variance"], x.var(0), rtol=1e-4, atol=1e-9)
    np.testing.assert_allclose(stats["fraction"], (x > 0).mean(0))
    assert facts["mean_expressed_genes"] == pytest.approx((x > 0).sum(1).mean())
    assert facts["zero_fraction"] == pytest.approx((x == 0).mean())


def test_splits_are_disjoint_and_readable(done):
    _, ingested = done
    ids = [ingested.blocks(s).ids for s in ("train", "validation", "test")]
    assert len(np.unique(np.concatenate(ids))) == 400
    table = ingested.blocks("test").read(ids[2][::-1][:5])
    cells = ingested.cells.set_index("soma_joinid").loc[ids[2][::-1][:5]]
    np.testing.assert_array_equal(table["soma_joinid"].to_numpy(), cells.index)
    np.testing.assert_array_equal(table["label:cell_type"].to_numpy(), cells["label:cell_type"])
    np.testing.assert_array_equal(table["library_size"].to_numpy(), cells["library_size"])


def test_anndata_draws_by_seed_with_labels(done):
    _, ingested = done
    a, b, c = (ingested.anndata("train", 30, seed) for seed in (0, 0, 1))
    assert a.shape == (30, 60)
    assert a.obs_names.equals(b.obs_names)
    assert not a.obs_names.equals(c.obs_names)
    assert list(a.obs["cell_type"].cat.categories) == list(ingested.vocabulary.label("cell_type").classes)
    assert a.var["feature_name"].iloc[0] == "GENE1"


def test_the_same_config_gives_the_same_digest(done, tmp_path):
    facts, _ = done
    assert run(tmp_path / "b", labels=["cell_type", "tissue_general"])[0]["digest"] == facts["digest"]
    other = run(tmp_path / "c", labels=["cell_type", "tissue_general"], split={"salt": "pepper"})[0]
    assert other["digest"] != facts["digest"]


def test_a_split_by_donor_keeps_donors_whole(tmp_path):
    source = {**SYNTHETIC, "n_donors": 40}
    facts, ingested = run(tmp_path / "a", source=source, labels=["donor_id"], split={"by": "donor_id", "test": 0.3})
    assert (ingested.cells.groupby("label:donor_id", observed=True)["split"].nunique() == 1).all()
    assert any("it cannot be learned" in note for note in facts["notes"])


def test_adding_cells_moves_no_cell_to_another_side():
    import pandas as pd

    few, many = (pd.DataFrame({"soma_joinid": np.arange(n)}) for n in (500, 9000))
    split = split_cells(many, SplitConfig())
    assert (split_cells(few, SplitConfig()) == split[:500]).all()
    assert 0.08 < (split == "test").mean() < 0.12


def test_a_part_of_the_cells_is_taken_where_it_is_asked_for(tmp_path):
    facts, ingested = run(tmp_path / "a", max_cells=100)
    assert sum(facts["n_cells"].values()) == len(ingested.cells) == 100
    assert any("100 of 400 cells were taken" in note for note in facts["notes"])
    assert ingested.cells["soma_joinid"].max() > 200
    whole, _ = run(tmp_path / "b", max_cells=400)
    assert sum(whole["n_cells"].values()) == 400
    assert not any("were taken" in note for note in whole["notes"])


def test_rare_genes_are_left_out_and_library_sizes_follow(tmp_path):
    facts, ingested = run(tmp_path / "a", genes={"min_cells": 60})
    assert facts["n_genes"] < facts["n_genes_source"] == 60
    assert (ingested.gene_stats["fraction"] * facts["n_cells"]["train"] > 59.5).all()
    x = ingested.anndata("validation")
    np.testing.assert_array_equal(x.obs["library_size"], np.asarray(x.X.sum(1)).ravel())


def test_a_large_experiment_is_sampled(tmp_path, monkeypatch):
    _, whole = run(tmp_path / "a")
    monkeypatch.setattr(ingest, "FULL_PASS_CELLS", 100)
    facts, ingested = run(tmp_path / "b", source={"type": "soma", "uri": str(tmp_path / "a" / "soma")})
    assert any("Gene statistics are from" in note for note in facts["notes"])
    np.testing.assert_array_equal(ingested.cells["library_size"], whole.cells["library_size"])


@pytest.mark.row("D:filter-matches-nothing")
def test_mistakes_are_explained(tmp_path):
    for config, words in [
        ({"labels": ["celltype"]}, "obs has no column 'celltype' .did you mean 'cell_type'"),
        ({"obs_filter": "cell_type == 'no such'"}, "leaves no cells"),
        ({"obs_filter": "cell == 'x'"}, "cannot be applied"),
        ({"genes": {"min_cells": 5000}}, "leaves no genes"),
        ({"split": {"by": "dataset_id", "test": 0.01}}, "no cell of 2 different dataset_id fell into"),
    ]:
        with pytest.raises(InputError, match=words):
            run(tmp_path / "a", **config)


def test_the_folder_can_be_moved(tmp_path):
    facts, _ = run(tmp_path / "a")
    (tmp_path / "a").rename(tmp_path / "b")
    moved = IngestedDataset.open(Manifest("ingest", "v", str(tmp_path / "b"), {}, {}, facts, 0.0, 0.0))
    assert moved.anndata("test").n_obs == facts["n_cells"]["test"]
    assert isinstance(moved.vocabulary, Vocabulary)
