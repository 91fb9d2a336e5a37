"""Moves tiles of real cells to another condition by a flow: what the actors of a perturb job do.

Shape letters: b cells of a tile, g genes.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, cast

import numpy as np

from pipeline.config.apply import PerturbConfig
from pipeline.inference.applier import ApplierSpec, Tile, TileOutput
from pipeline.inference.models import load_models, target_classes

if TYPE_CHECKING:
    import torch


class Perturber:
    """Moves tiles of cells to another condition."""

    synthetic = True

    def __init__(self, spec: ApplierSpec, device: torch.device):
        from scldm.checkpoints.asked_values import with_values
        from scldm.flow.config import SamplerConfig
        from scldm.generation.perturbed import Perturbation

        config = cast(PerturbConfig, spec.config)
        self.vae, flow = load_models(spec.models, device, weights=config.flow.weights)
        assert flow is not None  # the config requires one
        to = target_classes(config, flow.vocabulary)
        self.flow = with_values(flow, [to])
        self.encodes = config.start != "noise"
        self.vocabulary = self.vae.vocabulary
        sampler = SamplerConfig(**config.flow.model_dump(), guidance=config.guidance)
        counts = "changed" if config.method == "pooled" else config.counts
        self.perturbation = Perturbation(to, config.start, counts, sampler, spec.seed)

    def __call__(self, tile: Tile) -> TileOutput:
        from scldm.generation.perturbed import perturb_cells

        values, z = perturb_cells(self.vae, self.flow, tile.cells, tile.seen, self.perturbation, self.factors(tile))
        # The input's own columns stay.
        obs = {f"to_{k}": [v if v is not None else ""] * len(tile.ids) for k, v in self.perturbation.to.items()}
        return TileOutput(values=values, obsm={"X_scldm": z.flatten(1).float().cpu().numpy()}, obs=obs)

    def factors(self, tile: Tile) -> np.ndarray | None:
        """Return factors of the decoder's means under the new labels, (b, g); None: they stay as they are."""
        return None
