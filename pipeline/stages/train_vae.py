"""Trains the VAE: sparse cells from SOMA, through Ray Data, into DeepSpeed workers. Or takes one that is trained."""

from __future__ import annotations

from typing import Any

from pipeline.config.context import StageContext
from pipeline.config.job import TrainVaeConfig
from pipeline.stages.pretrained import use_pretrained
from pipeline.stages.training_spec import vae_spec
from pipeline.training.trainer import fit


def run(config: TrainVaeConfig, context: StageContext) -> dict[str, Any]:
    """Train, or take a trained one, and return the facts.

    Facts: model (folder), latent_shape, steps, n_parameters, metrics; of a training also checkpoint.
    """
    if config.pretrained is not None:
        return use_pretrained(config, context)
    return fit(vae_spec(config, context), config.train, context.resources, "train_vae")
