"""A worker's part of `distil`: train a copy of the teacher to jump along its trajectories, and export it."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch.distributed as dist

from pipeline.data.loading.blocks import IpcBlocks
from pipeline.training.loop import run_training
from pipeline.training.objectives.distil import DistilObjective
from pipeline.training.objectives.vae import validation_tables
from pipeline.training.state import Run
from pipeline.training.tasks.base import make_order, training_facts
from pipeline.training.tasks.spec import DistilWorkerSpec
from scldm.checkpoints.native import folder_digest, load_flow, new_dit, save_flow
from scldm.flow.config import Distilled
from scldm.flow.distilled import jump_times
from scldm.nn.flops import dit_flops

TRAJECTORIES = "trajectories"  # in the stage's folder


def distil_flow(spec: DistilWorkerSpec, run: Run) -> dict[str, Any]:
    """Train and export a distilled flow. Collective. Returns the stage's facts."""
    config, train = spec.config, spec.config.train
    teacher = load_flow(spec.teacher, weights=config.weights)
    shape = (teacher.n_latent_tokens, teacher.latent_width)
    dit = new_dit(teacher.dit.config, teacher.vocabulary, latent_shape=shape)
    own = dit.state_dict()
    dit.load_state_dict({k: v for k, v in teacher.dit.state_dict().items() if k in own})  # all but from_controls
    source, held_out = (trajectory_blocks(spec, split) for split in ("train", "validation"))
    order = make_order(source, train.feed, spec.seed)
    objective = DistilObjective(
        dit, times=jump_times(config.evaluations, teacher.path), latent_shape=shape,
        validation=validation_tables(
            held_out, n_cells=len(held_out.ids), batch_size=train.feed.micro_batch_size, seed=spec.seed
        ),
    )  # fmt: skip
    flops = config.evaluations * dit_flops(dit.config, n_latent_tokens=shape[0], latent_width=shape[1])
    result = run_training(objective, source, order, train, replace(run, flops_per_cell=flops), ema_config=train.ema)
    raw = result.engine.export_state(result.checkpoint)
    assert result.ema is not None
    if dist.get_rank() == 0:
        averaged = {**raw, **{k: v.float().cpu() for k, v in result.ema.state_dict().items()}}
        save_flow(
            run.folder / "model", {"model": averaged, "raw": raw}, config=dit.config, path=teacher.path,
            latent_shape=shape, vocabulary=teacher.vocabulary, library_sizes=teacher.library_sizes, card=spec.card,
            distilled=Distilled(
                evaluations=config.evaluations, guidance=config.guidance, teacher=folder_digest(spec.teacher)
            ),
        )  # fmt: skip
    dist.barrier()
    return training_facts(result, train.export, dit)


def trajectory_blocks(spec: DistilWorkerSpec, split: str) -> IpcBlocks:
    """Open the solved trajectories of a split as a source of blocks."""
    return IpcBlocks(str(spec.folder / TRAJECTORIES), tuple(spec.trajectories[split]), made_by="distil")
