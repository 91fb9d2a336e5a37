"""Reconstruct real cells: encode and decode them, and write counts, means, or both, in the order of the input."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from pipeline.config.apply import ReconstructConfig
from pipeline.config.context import StageContext
from pipeline.inference.applier import ApplierSpec, OutputLayout, Tile, TileOutput, Values
from pipeline.inference.apply_job import Pool, run_batches
from pipeline.inference.models import draws_counts, latent_width, load_models, locate_models
from scldm.data.vocabulary import Vocabulary
from scldm.errors import InputError

if TYPE_CHECKING:
    import torch

    from scldm.checkpoints.native import LoadedFlow

MAX_DENSE_BYTES = 4 << 30  # of means in one shard


class Reconstructor:
    """Encodes and decodes tiles of cells."""

    encodes = True
    flow: LoadedFlow | None = None
    synthetic = True

    def __init__(self, spec: ApplierSpec, device: torch.device):
        self.decode, self.seed = cast(ReconstructConfig, spec.config).decode, spec.seed
        self.vae, _ = load_models(spec.models, device)
        self.vocabulary = self.vae.vocabulary

    def __call__(self, tile: Tile) -> TileOutput:
        import torch

        from scldm.generation.real_cells import draw_sparse

        with torch.inference_mode():
            z = self.vae.vae.encode(tile.seen)
            out = self.vae.vae.decode(z, tile.cells.library_size, measured=tile.cells.measured)
        output = TileOutput(obsm={"X_scldm": z.flatten(1).float().cpu().numpy()})
        if self.decode != "mean":
            output.values = draw_sparse(out, tile.ids.tolist(), seed=self.seed)
        if self.decode != "counts":
            output.mean = out.mu.float().cpu().numpy()
        return output


def run(config: ReconstructConfig, context: StageContext, pool: Pool | None = None) -> dict[str, Any]:
    """Run the stage; returns the facts of `run_batches`."""
    vae = locate_models(config, context).vae
    mean = config.decode != "counts"
    n_genes = Vocabulary.load(Path(vae) / "vocabulary.json").n_genes
    if mean and (size := 4 * n_genes * config.shard_size) > MAX_DENSE_BYTES:
        fits = MAX_DENSE_BYTES // (4 * n_genes)
        raise InputError(
            f"decode ({config.decode}) writes dense means: {config.shard_size:,} cells x {n_genes:,} genes are "
            f"{size / 2**30:.1f} GiB in a shard, more than {MAX_DENSE_BYTES >> 30}; set shard_size={fits} or less"
        )
    drawn: Values = "counts" if draws_counts(vae) else "log1p_cp10k"
    values = drawn if config.decode != "mean" else None
    layout = OutputLayout(
        genes=True, values=values, mean=None if not mean else drawn, obsm={"X_scldm": latent_width(vae)}
    )
    return run_batches(config, context, stage="reconstruct", processor=Reconstructor, layout=layout, pool=pool)
