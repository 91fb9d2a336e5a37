"""Real cells, encoded and decoded: a draw of counts, the mean, or both, as sharded AnnData in the input's order."""

from __future__ import annotations

from typing import Any

from pipeline.config.apply import ReconstructConfig
from pipeline.core.manifest import StageContext
from pipeline.inference.applier import Made, Tile
from pipeline.inference.apply_job import Output, Pool, run_batches
from pipeline.inference.models import latent_width, load_models, locate_models
from scldm.data.vocabulary import Vocabulary
from scldm.errors import InputError

MOST_DENSE_BYTES = 4 << 30  # of means in one shard


class Maker:
    """The stage's part of an actor."""

    encodes = True
    synthetic = True

    def __init__(self, spec: dict[str, Any], device: Any):
        self.decode, self.seed = spec["config"]["decode"], spec["seed"]
        self.vae, _ = load_models(spec["models"], device, counts=self.decode != "mean")
        self.vocabulary = self.vae.vocabulary

    def __call__(self, tile: Tile) -> Made:
        import torch

        from scldm.generation.real_cells import draw_sparse

        with torch.inference_mode():
            z = self.vae.vae.encode(tile.seen)
            out = self.vae.vae.decode(z, tile.cells.library_size, measured=tile.cells.measured)
        made = Made(obsm={"X_scldm": z.flatten(1).float().cpu().numpy()})
        if self.decode != "mean":
            made.counts = draw_sparse(out, tile.ids.tolist(), seed=self.seed)
        if self.decode != "counts":
            made.layers["mean"] = out.mu.float().cpu().numpy()
        return made


def run(config: ReconstructConfig, context: StageContext, pool: Pool | None = None) -> dict[str, Any]:
    """Facts as `run_batches`."""
    from pathlib import Path

    vae = locate_models(config, context).vae
    mean = config.decode != "counts"
    n_genes = Vocabulary.load(Path(vae) / "vocabulary.json").n_genes
    if mean and (size := 4 * n_genes * config.shard_size) > MOST_DENSE_BYTES:
        fits = MOST_DENSE_BYTES // (4 * n_genes)
        raise InputError(
            f"decode ({config.decode}) writes dense means: {config.shard_size:,} cells x {n_genes:,} genes are "
            f"{size / 2**30:.1f} GiB in a shard, more than {MOST_DENSE_BYTES >> 30}; set shard_size={fits} or less"
        )
    output = Output(genes=True, counts=config.decode != "mean", mean=mean, obsm={"X_scldm": latent_width(vae)})
    return run_batches(config, context, stage="reconstruct", output=output, pool=pool)
