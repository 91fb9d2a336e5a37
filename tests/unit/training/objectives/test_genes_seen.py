"""Which genes the encoder sees in training: as the config says, drawn by (seed, epoch, cell), never in validation."""

from types import SimpleNamespace

import pyarrow as pa
import pytest
import torch

from pipeline.config.job import TrainVaeConfig, VaeTrainConfig
from pipeline.core.manifest import Manifest
from pipeline.training.objectives.vae import VaeObjective, seen_seed
from pipeline.workflow.preflight import check_against_data
from scldm.data.batch import CellBatch
from scldm.data.gene_sampling import see_genes
from scldm.data.genes_seen import GenesSeenConfig
from scldm.errors import InputError
from scldm.nn.config import VAEConfig
from scldm.nn.vae import VAE

G = 14


@pytest.fixture(scope="module")
def table() -> pa.Table:
    """Six cells of 3, 4, … genes."""
    genes = [list(range(i, i + 3 + i)) for i in range(6)]
    return pa.table(
        {
            "soma_joinid": pa.array([10 * i for i in range(6)], pa.int64()),
            "gene": pa.array(genes, pa.list_(pa.uint16())),
            "count": pa.array([[1 + g % 4 for g in x] for x in genes], pa.list_(pa.uint16())),
            "library_size": pa.array([float(sum(1 + g % 4 for g in x)) for x in genes], pa.float32()),
        }
    )


class Recorder:
    """Stands for the model: remembers what it was given."""

    def __call__(self, cells: CellBatch, sample, seen: CellBatch) -> torch.Tensor:
        self.cells, self.seen = cells, seen
        return torch.zeros(cells.n_cells)


def objective(mode: str, n: int | None = None, *, seed: int = 0, validation=()) -> VaeObjective:
    torch.manual_seed(0)
    vae = VAE(VAEConfig(d_model=8, n_layers=1, n_heads=2, n_heads_cross=2, n_latent_tokens=2), n_genes=G)
    return VaeObjective(
        vae, labels=[], mean_counts=torch.arange(G) / 4.0, genes_per_step=None, max_genes=None, seed=seed,
        validation=validation, genes_seen=GenesSeenConfig(mode=mode, n=n),
    )  # fmt: skip


def seen_in(epoch: int, table, mode: str, n: int | None, *, seed: int = 0) -> Recorder:
    model = Recorder()
    part, trained = SimpleNamespace(step=0, epoch=epoch, start=0), objective(mode, n, seed=seed)
    trained.loss(model, trained.prepare(table, part), part)
    return model


MODES = [("all", None), ("random", 5), ("weighted", 5), ("random_expressed", 2), ("expressed_zero", 5)]


@pytest.mark.parametrize(("mode", "n"), MODES)
def test_training_sees_the_genes_of_the_mode_and_scores_the_whole_cell(table, mode, n):
    got = seen_in(3, table, mode, n)
    means = (torch.arange(G) / 4.0).clamp(min=0.25)
    config = GenesSeenConfig(mode=mode, n=n)
    expected = see_genes(got.cells, config, n_genes=G, seed=seen_seed(0, 3), mean_counts=means)
    assert torch.equal(got.seen.gene_ids, expected.gene_ids)
    assert torch.equal(got.seen.counts, expected.counts)
    assert got.cells.lengths.tolist() == [3, 4, 5, 6, 7, 8]


@pytest.mark.parametrize(("mode", "n"), MODES[1:])
def test_a_draw_is_a_function_of_seed_epoch_and_cell(table, mode, n):
    first = seen_in(0, table, mode, n).seen.gene_ids
    assert torch.equal(first, seen_in(0, table, mode, n).seen.gene_ids)
    assert not torch.equal(first, seen_in(1, table, mode, n).seen.gene_ids)
    assert not torch.equal(first, seen_in(0, table, mode, n, seed=1).seen.gene_ids)
    later = seen_in(0, table.slice(4), mode, n).seen  # another batch, as another worker would have
    assert later.gene_ids.tolist() == first.tolist()[-len(later.gene_ids) :]


def test_expressed_gives_the_model_the_cells_unchanged(table):
    got = seen_in(0, table, "expressed", None)
    assert got.seen is got.cells


@pytest.mark.parametrize(("mode", "n"), MODES)
def test_validation_sees_the_expressed_genes_whatever_the_mode(table, mode, n):
    with torch.no_grad():
        plain = objective("expressed", validation=[table]).validation(0, 1)
        assert objective(mode, n, validation=[table]).validation(0, 1) == plain


@pytest.mark.parametrize(("mode", "n"), MODES)
def test_the_loss_of_every_mode_can_be_trained_on(table, mode, n):
    trained = objective(mode, n)
    part = SimpleNamespace(step=0, epoch=0, start=0)
    loss = trained.loss(trained.module, trained.prepare(table, part), part)
    loss.sum().backward()
    assert torch.isfinite(loss).all()
    assert all(torch.isfinite(p.grad).all() for p in trained.module.parameters() if p.grad is not None)


def test_two_ways_to_choose_the_genes_are_refused():
    feed = {"max_genes": 100}
    with pytest.raises(ValueError, match=r"feed\.max_genes \(100\) and genes_seen \(mode random\) both choose"):
        VaeTrainConfig.model_validate({"feed": feed, "genes_seen": {"mode": "random", "n": 50}})
    assert VaeTrainConfig.model_validate({"feed": feed, "genes_seen": {"mode": "expressed"}}).feed.max_genes == 100


def test_more_genes_than_exist_is_an_error_before_training():
    config = TrainVaeConfig.model_validate({"train": {"genes_seen": {"mode": "random", "n": 50}}})
    facts = {"n_genes": 40, "n_cells": {"validation": 10}}
    manifest = Manifest("ingest", "v", "/nowhere", {}, {}, facts, 0.0, 0.0)
    with pytest.raises(InputError, match=r"train\.genes_seen\.n \(50\) is more than the 40 genes"):
        check_against_data({"train_vae": config}, manifest)
    check_against_data({"train_vae": config}, Manifest(**{**vars(manifest), "facts": {**facts, "n_genes": 50}}))
