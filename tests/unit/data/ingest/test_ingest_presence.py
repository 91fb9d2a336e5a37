"""Ingest with `presence: true`: from files, from a Census-shaped store, from a vocabulary that the source lacks."""

from types import SimpleNamespace

import anndata
import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
import scipy.sparse as sp
import tiledbsoma
import torch

from pipeline.config.context import StageContext
from pipeline.config.job import IngestConfig
from pipeline.core.manifest import Manifest
from pipeline.data.ingest.dataset import IngestedDataset
from pipeline.data.presence import GROUP
from pipeline.data.soma.write import write_experiment
from pipeline.stages import ingest
from pipeline.training.objectives.vae import VaeObjective
from scldm.errors import InputError
from scldm.nn.config import VAEConfig
from scldm.nn.vae import VAE

GENES = [f"ENSG{i:011d}" for i in range(8)]


def run(folder, **config):
    folder.mkdir(exist_ok=True)
    context = StageContext(folder, {}, 0, SimpleNamespace(), None)
    facts = ingest.run(IngestConfig.model_validate(config), context)
    return facts, IngestedDataset.open(Manifest("ingest", "v", str(folder), {}, {}, facts, 0.0, 0.0))


@pytest.fixture
def two_files(tmp_path):
    """a.h5ad measured genes 0-5, b.h5ad genes 3-7; gene 0 is the highest."""
    rng = np.random.default_rng(0)
    folder = tmp_path / "files"
    folder.mkdir()
    for name, genes, n in (("a", range(6), 60), ("b", range(3, 8), 40)):
        x = rng.poisson([9 - g for g in genes], (n, len(genes))).astype(np.float32)
        obs = pd.DataFrame({"cell_type": ["x", "y"] * (n // 2)}, index=[f"{name}{i}" for i in range(n)])
        var = pd.DataFrame(index=[GENES[g] for g in genes])
        anndata.AnnData(sp.csr_matrix(x), obs=obs, var=var).write_h5ad(folder / f"{name}.h5ad")
    return {"type": "h5ad", "path": str(folder)}


@pytest.fixture
def census(tmp_path):
    """An experiment laid out as the Census: two data sets, a presence matrix, data sets numbered in census_info."""
    rng = np.random.default_rng(1)
    root = tmp_path / "census"
    (root / "census_data").mkdir(parents=True)
    measured = {"later": [1, 1, 0, 1, 1, 0, 1, 1], "first": [1, 0, 1, 1, 1, 0, 1, 1]}
    of = np.where(np.arange(80) % 4 == 0, "later", "first")
    x = rng.poisson(3, (80, 8)) * np.array([measured[d] for d in of])
    obs = pd.DataFrame({"cell_type": ["x", "y"] * 40, "dataset_id": of, "is_primary_data": True})
    var = pd.DataFrame({"feature_id": GENES, "feature_name": GENES, "feature_length": 0})
    store = write_experiment(
        root / "census_data" / "homo_sapiens", obs, var, [sp.csr_matrix(x.astype(np.float32))], tile=16
    )
    info = pd.DataFrame({"soma_joinid": [0, 1, 2], "dataset_id": ["first", "unused", "later"]})
    with tiledbsoma.Collection.create(str(root / "census_info")) as collection:
        table = pa.Table.from_pandas(info, preserve_index=False)
        with collection.add_new_dataframe(
            "datasets", schema=table.schema, index_column_names=["soma_joinid"], domain=[(0, 9)]
        ) as frame:
            frame.write(table)
    bits = np.array([measured["first"], [1] * 8, measured["later"]])
    row, gene = bits.nonzero()
    with tiledbsoma.open(f"{store.uri}/ms/RNA", "w") as rna:
        array = rna.add_new_sparse_ndarray("feature_dataset_presence_matrix", type=pa.uint8(), shape=(3, 8))
        array.write(pa.table({"soma_dim_0": row, "soma_dim_1": gene, "soma_data": np.ones(len(row), np.uint8)}))
    return {"type": "soma", "uri": store.uri}, measured, of, x


def test_genes_of_a_file_are_what_its_cells_measured(two_files, tmp_path):
    facts, data = run(tmp_path / "a", source=two_files, genes={"presence": True})
    assert facts["presence_groups"] == 2
    joinids = data.cells["soma_joinid"].to_numpy()
    known = data.measured_by(joinids)
    order = [data.vocabulary.feature_ids.index(g) for g in GENES]
    expected = np.where(joinids[:, None] < 60, np.arange(8) < 6, np.arange(8) >= 3)
    np.testing.assert_array_equal(known[:, order], expected)
    assert any("2 groups of data sets measured between 5 and 6 of 8 genes" in note for note in facts["notes"])


def test_means_are_over_the_cells_that_measured_the_gene(two_files, tmp_path):
    _, data = run(tmp_path / "a", source=two_files, genes={"presence": True})
    train = data.anndata("train")
    known = data.measured_by(train.obs_names.astype(int).to_numpy())
    x = np.where(known, train.X.toarray(), np.nan)
    np.testing.assert_allclose(data.gene_stats["mean"], np.nanmean(x, 0), rtol=1e-6)
    np.testing.assert_allclose(data.gene_stats["variance"], np.nanvar(x, 0), rtol=1e-4)
    np.testing.assert_allclose(data.gene_stats["fraction"], np.nanmean(x > 0, 0) * known.shape[0] / known.sum(0))


def test_without_presence_nothing_is_kept_and_a_note_says_what_zeros_mean(two_files, tmp_path):
    facts, data = run(tmp_path / "a", source=two_files)
    assert data.measured is None
    assert "presence" not in facts
    assert GROUP not in data.reader.labels
    assert any("taken as zeros in its cells; ingest.genes.presence=true" in note for note in facts["notes"])


def test_the_digest_tells_masked_from_unmasked(two_files, tmp_path):
    digests = {run(tmp_path / f"{p}", source=two_files, genes={"presence": p})[0]["digest"] for p in (True, False)}
    assert len(digests) == 2


def test_the_matrix_of_a_census_is_read_by_data_set(census, tmp_path):
    source, measured, of, _ = census
    facts, data = run(tmp_path / "a", source=source, genes={"presence": True})
    assert facts["presence_groups"] == 2
    joinids = data.cells["soma_joinid"].to_numpy()
    np.testing.assert_array_equal(data.measured_by(joinids), [np.array(measured[of[j]], bool) for j in joinids])
    assert any("1 genes were measured in no cell" in note for note in facts["notes"])


def test_presence_follows_a_filter_and_a_vocabulary(census, tmp_path):
    source, measured, *_ = census
    genes = tmp_path / "genes.txt"
    genes.write_text("\n".join([GENES[2], GENES[0], "ENSG00000099999"]))
    config = {"vocabulary": str(genes), "max_missing": 0.5, "presence": True}
    facts, data = run(tmp_path / "a", source=source, genes=config, cells={"where": {"dataset_id": "first"}})
    assert data.measured.tolist() == [[bool(measured["first"][2]), bool(measured["first"][0]), False]]
    assert any("left out of the likelihood" in note for note in facts["notes"])


def test_a_store_that_does_not_say_is_refused(tmp_path):
    _, data = run(tmp_path / "a", source={"type": "synthetic", "n_cells": 200, "n_genes": 30})
    with pytest.raises(InputError, match="has no feature_dataset_presence_matrix"):
        run(tmp_path / "b", source={"type": "soma", "uri": data.soma_uri}, genes={"presence": True})


def test_a_mask_that_would_hide_nothing_is_not_made(tmp_path):
    source = {"type": "synthetic", "n_cells": 200, "n_genes": 30}
    facts, data = run(tmp_path / "a", source=source, genes={"presence": True})
    assert data.measured is None
    assert any("masks nothing" in note for note in facts["notes"])


@pytest.mark.parametrize("genes_per_step", [None, 5])
def test_training_scores_measured_genes_alone(two_files, tmp_path, genes_per_step):
    """The loss does not move when the logit of a gene that the cells did not measure does."""
    _, data = run(tmp_path / "a", source=two_files, genes={"presence": True})
    torch.manual_seed(0)
    vae = VAE(VAEConfig(d_model=8, n_layers=1, n_heads=2, n_heads_cross=2, n_latent_tokens=2), n_genes=8)
    objective = VaeObjective(
        vae, labels=["cell_type"], mean_counts=torch.ones(8), genes_per_step=genes_per_step, max_genes=None, seed=0,
        validation=[], measured=torch.from_numpy(data.measured),
    )  # fmt: skip
    blocks = data.blocks("train")
    table = blocks.read(blocks.ids[blocks.ids < 60][:16])  # of a.h5ad
    step = SimpleNamespace(step=0, epoch=0, start=0)
    batch = objective.prepare(table, step)
    before = objective.loss(vae, batch, step)
    with torch.no_grad():
        vae.gene_bias[[data.vocabulary.feature_ids.index(g) for g in GENES[6:]]] += 5
    after = objective.loss(vae, batch, step)
    torch.testing.assert_close(after, before)
    with torch.no_grad():
        vae.gene_bias[data.vocabulary.feature_ids.index(GENES[0])] += 5
    assert not torch.allclose(objective.loss(vae, batch, step), before)


def test_a_cache_keeps_what_was_measured_beside_each_cell(two_files, tmp_path):
    config = {"source": two_files, "genes": {"presence": True}, "cache": str(tmp_path / "cache")}
    _, data = run(tmp_path / "a", **config)
    blocks = data.blocks("train")
    ids = blocks.ids[::-1][:30]
    found = blocks.read(ids)
    assert found.equals(data.all_blocks().read(ids))
    np.testing.assert_array_equal(data.measured[found[f"label:{GROUP}"].to_numpy()], data.measured_by(ids))
