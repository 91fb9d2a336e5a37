"""Embed real cells: latents in obsm["X_scldm"] of sharded AnnData, with the names and the order of the input."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from pipeline.config.apply import EmbedConfig
from pipeline.config.context import StageContext
from pipeline.inference.applier import ApplierSpec, OutputLayout, Tile, TileOutput
from pipeline.inference.apply_job import Pool, run_batches
from pipeline.inference.models import latent_width, load_models, locate_models

if TYPE_CHECKING:
    import torch

    from scldm.checkpoints.native import LoadedFlow


class Embedder:
    """Encodes tiles of cells."""

    encodes = True
    flow: LoadedFlow | None = None
    synthetic = False

    def __init__(self, spec: ApplierSpec, device: torch.device):
        self.vae, _ = load_models(spec.models, device, decodes=False)
        self.vocabulary = self.vae.vocabulary

    def __call__(self, tile: Tile) -> TileOutput:
        import torch

        with torch.inference_mode():
            z = self.vae.vae.encode(tile.seen)
        return TileOutput(obsm={"X_scldm": z.flatten(1).float().cpu().numpy()})


def run(config: EmbedConfig, context: StageContext, pool: Pool | None = None) -> dict[str, Any]:
    """Run the stage; returns the facts of `run_batches`."""
    layout = OutputLayout(obsm={"X_scldm": latent_width(locate_models(config, context).vae)})
    return run_batches(config, context, stage="embed", processor=Embedder, layout=layout, pool=pool)
