"""Latents of real cells, aligned to the names and the order of the input: obsm["X_scldm"] of sharded AnnData."""

from __future__ import annotations

from typing import Any

from pipeline.config.apply import EmbedConfig
from pipeline.core.manifest import StageContext
from pipeline.inference.applier import Made, Tile
from pipeline.inference.apply_job import Output, Pool, run_batches
from pipeline.inference.models import latent_width, load_models, locate_models


class Maker:
    """The stage's part of an actor."""

    encodes = True
    synthetic = False

    def __init__(self, spec: dict[str, Any], device: Any):
        self.vae, _ = load_models(spec["models"], device)
        self.vocabulary = self.vae.vocabulary

    def __call__(self, tile: Tile) -> Made:
        import torch

        with torch.inference_mode():
            z = self.vae.vae.encode(tile.seen)
        return Made(obsm={"X_scldm": z.flatten(1).float().cpu().numpy()})


def run(config: EmbedConfig, context: StageContext, pool: Pool | None = None) -> dict[str, Any]:
    """Facts as `run_batches`."""
    output = Output(obsm={"X_scldm": latent_width(locate_models(config, context).vae)})
    return run_batches(config, context, stage="embed", output=output, pool=pool)
