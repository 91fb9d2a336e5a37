"""The random draws of the flow's training, and the precisions that it allows."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from pipeline.config.job import TrainFlowConfig
from pipeline.data.loading.order import FeedOrder
from pipeline.training.objectives.base import MicroBatchIndex
from pipeline.training.objectives.flow import Draws, FlowDraws, flow_losses
from scldm.flow.config import PathConfig
from scldm.nn.config import DiTConfig
from scldm.nn.dit import DiT

SHAPE, BATCH, LANES = (3, 2), 8, 4
ORDER = FeedOrder(np.arange(100), 16, 0, BATCH, LANES, 16)


def draws(rank: int, world_size: int, seed: int = 0) -> FlowDraws:
    return FlowDraws(seed, ORDER, ORDER.lanes_of(rank, world_size), latent_shape=SHAPE, n_labels=1)


def by_cell(step: int, world_size: int, micro: int, seed: int = 0) -> dict[int, Draws]:
    """Return each cell's draws in a step, for a number of workers and a micro batch size."""
    found: dict[int, Draws] = {}
    at = ORDER.locate(step)
    q = ORDER.rows_per_lane
    for rank in range(world_size):
        ids: list[int] = []
        for lane in ORDER.lanes_of(rank, world_size):
            ids += ORDER.block(at.epoch, at.round, lane)[0][at.batch * q : (at.batch + 1) * q].tolist()
        own = draws(rank, world_size, seed)
        for start in range(0, len(ids), micro):
            part = own.for_micro_batch(MicroBatchIndex(step, at.epoch, start), min(micro, len(ids) - start))
            found |= {i: part.rows(k, 1) for k, i in enumerate(ids[start : start + micro])}
    return found


@pytest.mark.parametrize("step", [0, 5])
def test_noise_time_and_coins_are_a_function_of_seed_step_and_cell(step):
    one, two, four = (by_cell(step, w, micro) for w, micro in ((1, 8), (2, 3), (4, 1)))
    assert one.keys() == two.keys() == four.keys()
    for i in one:
        for field in ("x0", "t", "coins"):
            assert torch.equal(getattr(one[i], field), getattr(two[i], field))
            assert torch.equal(getattr(one[i], field), getattr(four[i], field))
    times = [float(d.t) for d in one.values()]
    assert len(set(times)) == len(times), "every cell, so every worker, has its own"


def test_another_step_or_seed_gives_other_draws():
    first = {float(d.t) for d in by_cell(0, 1, 8).values()}
    assert not first & {float(d.t) for d in by_cell(1, 1, 8).values()}
    assert not first & {float(d.t) for d in by_cell(0, 1, 8, seed=1).values()}


def test_validation_draws_belong_to_the_cell_however_it_is_batched():
    ids = torch.tensor([5, 90, 17])
    whole = draws(0, 1).for_validation(ids)
    single = draws(1, 2).for_validation(ids[1:2])
    assert torch.equal(whole.rows(1, 1).x0, single.x0)
    assert torch.equal(whole.rows(1, 1).t, single.t)


def test_a_flow_in_bf16_takes_noise_and_latents_in_fp32():
    dit = DiT(DiTConfig(d_model=16, n_layers=1, n_heads=2), n_latent_tokens=3, latent_width=2, n_classes={"a": 2})
    dit = dit.bfloat16()
    d = draws(0, 1).for_micro_batch(MicroBatchIndex(0, 0, 0), 4)
    loss = flow_losses(dit, torch.randn(4, *SHAPE), d, {"a": torch.zeros(4, dtype=torch.long)}, PathConfig())
    assert loss.dtype == torch.float32
    loss.sum().backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in dit.parameters())


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ({"vae": {"weight": 2}}, r"weight .*vae\.train is true"),
        ({"train": {"feed": {"max_genes": 10}}}, "set vae.train=true"),
        ({"vae": {"train": True, "weight": 0}}, "greater than 0"),
    ],
)
def test_settings_that_make_no_sense_together_are_refused(section, message):
    with pytest.raises(ValueError, match=message):
        TrainFlowConfig.model_validate(section)
