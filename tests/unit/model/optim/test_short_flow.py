"""Short trainings of a flow: functions of their arguments, that learn where cells are."""

from __future__ import annotations

import pytest
import torch

from scldm.flow.config import PathConfig, SamplerConfig
from scldm.flow.sampler import sample_latents
from scldm.nn.config import DiTConfig
from scldm.nn.dit import DiT
from scldm.optim.config import EMAConfig, OptimizerConfig
from scldm.optim.short_flow import ShortTraining, batches, new_dit, train_flow

SIZES, CLASSES = DiTConfig(d_model=16, n_layers=1, n_heads=2), {"drug": 2}


def cells(n: int = 200) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Latents (n, 2, 3) around -1 and 1, by class."""
    ids = torch.arange(n) % 2
    z = (2.0 * ids - 1)[:, None, None] + 0.1 * torch.randn(n, 2, 3, generator=torch.Generator().manual_seed(0))
    return z, {"drug": ids}


def trained(steps: int = 20, seed: int = 0, start=None, **changes):
    z, ids = cells()
    dit = new_dit(SIZES, latent_shape=(2, 3), n_classes=CLASSES, seed=seed)
    if start is not None:
        dit.load_state_dict(start)
    training = ShortTraining(steps, 64, OptimizerConfig(lr=1e-2), EMAConfig(decay=0.9))
    return train_flow(dit, z, ids, training, path=PathConfig(), label_dropout=0.1, seed=seed, **changes)


def test_one_seed_gives_the_same_weights_and_another_others():
    first, again, other = trained(), trained(), trained(seed=1)
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert any(not torch.equal(first[name], other[name]) for name in first)


def test_global_randomness_is_neither_used_nor_changed():
    torch.manual_seed(3)
    before = torch.get_rng_state()
    first = trained()
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(4)
    assert all(torch.equal(first[k], v) for k, v in trained().items())


def test_cells_are_generated_where_those_of_their_class_are():
    state = trained(steps=300)
    dit = DiT(SIZES, n_latent_tokens=2, latent_width=3, n_classes=CLASSES)
    dit.load_state_dict(state)
    ids = torch.arange(100) % 2
    noise = torch.randn(100, 2, 3, generator=torch.Generator().manual_seed(1))
    z = sample_latents(dit.eval(), noise, {"drug": ids}, SamplerConfig(steps=8), PathConfig())
    assert z[ids == 0].mean() < -0.6
    assert z[ids == 1].mean() > 0.6


def test_training_goes_on_from_given_weights():
    base = trained(steps=100)
    after = trained(steps=1, start=base)
    changed = max(float((after[k] - base[k]).abs().max()) for k in base)
    assert 0 < changed < 0.05


def test_progress_counts_the_steps():
    seen: list[int] = []
    trained(steps=3, progress=seen.append)
    assert seen == [1, 2, 3]


def test_an_epoch_has_every_row_once():
    rows = batches(10, 5, seed=0)
    epoch = torch.cat([next(rows), next(rows)])
    assert sorted(epoch.tolist()) == list(range(10))


def test_latents_that_are_not_finite_end_the_training():
    z, ids = cells()
    z[0] = float("nan")
    dit = new_dit(SIZES, latent_shape=(2, 3), n_classes=CLASSES, seed=0)
    training = ShortTraining(10, 200, OptimizerConfig(), EMAConfig())
    with pytest.raises(FloatingPointError, match="at step 0"):
        train_flow(dit, z, ids, training, path=PathConfig(), label_dropout=0.1, seed=0)
