"""Cells that are generated and scored while the flow trains."""

import anndata
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp
import torch
from helpers.models.small_models import CELL_TYPES, GENES, write_flow, write_vae

from pipeline.config.job import TrainFlowConfig
from pipeline.training.objectives.samples import FlowSamples
from scldm.checkpoints.native import load_flow, load_vae


def real(n, seed):
    """Cells of which each type has its own two genes high."""
    rng = np.random.default_rng(seed)
    types = np.arange(n) % 3
    rate = np.where(np.arange(6) // 2 == types[:, None], 30.0, 4.0)
    obs = pd.DataFrame({"cell_type": pd.Categorical(np.array(CELL_TYPES.classes)[types])}, index=map(str, range(n)))
    return anndata.AnnData(sp.csr_matrix(rng.poisson(rate).astype(np.float32)), obs, pd.DataFrame(index=list(GENES)))


@pytest.fixture
def models(tmp_path):
    return load_vae(write_vae(tmp_path / "vae")), load_flow(write_flow(tmp_path / "flow"))


def samples(models, **changes):
    vae, flow = models
    return FlowSamples(real(48, 0), real(192, 1), vae, **{"path": flow.path, "every": 2, "seed": 0} | changes)


def test_the_same_cells_are_scored_every_n_validations(models):
    chosen, dit = samples(models), models[1].dit.train()
    first, none, again = (chosen.scores(dit) for _ in range(3))
    assert none == {}
    assert first == again
    assert dit.training
    for name in ("gen_w2", "gen_frechet", "gen_auroc", "gen_conditional_w2.cell_type", "gen_label_accuracy.cell_type"):
        assert np.isfinite(first[name])
        assert np.isfinite(first[f"{name}_floor"])
    assert first["gen_w2"] > 2 * first["gen_w2_floor"]  # weights are random
    assert first["gen_label_accuracy.cell_type_floor"] > 0.9


def test_values_of_a_gaussian_head_are_compared_with_real_cells_on_their_scale(tmp_path):
    vae = load_vae(write_vae(tmp_path / "vae", head="gaussian"))
    models = vae, load_flow(write_flow(tmp_path / "flow"))
    found = samples(models).scores(models[1].dit)
    assert {"gen_w2", "gen_w2_floor", "gen_gene_mean_r2", "gen_label_accuracy.cell_type"} <= found.keys()
    assert np.isfinite(list(found.values())).all()
    assert found["gen_w2"] > 2 * found["gen_w2_floor"]


def test_other_weights_give_other_scores(models):
    chosen, dit = samples(models, every=1), models[1].dit
    before = chosen.scores(dit)
    with torch.no_grad():
        for p in dit.parameters():
            p.add_(0.3)
    after = chosen.scores(dit)
    assert before["gen_w2"] != after["gen_w2"]
    assert before["gen_w2_floor"] == after["gen_w2_floor"]


def test_a_model_whose_cells_cannot_be_scored_is_logged_and_training_goes_on(models, caplog):
    chosen, dit = samples(models, every=1), models[1].dit
    with torch.no_grad():
        next(dit.parameters()).fill_(torch.nan)
    assert chosen.scores(dit) == {}
    assert "cannot be scored" in caplog.text


def test_samples_are_refused_under_zero_3_and_in_joint_training():
    with pytest.raises(
        ValueError, match=r"sample_every \(1\) lets worker 0 run the network alone, and zero_stage \(3\)"
    ):
        TrainFlowConfig.model_validate({"train": {"sample_every": 1, "zero_stage": 3}})
    assert TrainFlowConfig().train.sample_every is None
    with pytest.raises(ValueError, match=r"train\.sample_every \(1\) generates with the VAE of train_vae"):
        TrainFlowConfig.model_validate({"train": {"sample_every": 1}, "vae": {"train": True}})
