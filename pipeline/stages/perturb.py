"""Real cells under another condition: what would this cell be, had it another label?

From latents, the flow is run backwards to the noise that the cell comes from, and forwards under the new labels, so
that what the labels do not explain stays the cell's. From noise, a new cell is made with its labels and library size.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pipeline.config.apply import PerturbConfig
from pipeline.core.manifest import StageContext
from pipeline.inference.applier import Made, Tile
from pipeline.inference.apply_job import Output, Pool, run_batches
from pipeline.inference.models import check_target, latent_width, load_models, locate_models
from scldm.data.vocabulary import Vocabulary


class Maker:
    """The stage's part of an actor."""

    synthetic = True

    def __init__(self, spec: dict[str, Any], device: Any):
        self.config = PerturbConfig.model_validate(spec["config"])
        self.vae, self.flow = load_models(spec["models"], device, weights=self.config.flow.weights, counts=True)
        self.encodes = self.config.start == "latents"
        self.vocabulary, self.seed = self.vae.vocabulary, spec["seed"]

    def __call__(self, tile: Tile) -> Made:
        import torch

        from scldm.flow.config import SamplerConfig
        from scldm.flow.sampler import sample_latents
        from scldm.generation.real_cells import draw_sparse, fresh_noise, under_condition

        target, obs = self._target(tile)
        sampler = SamplerConfig(**self.config.flow.model_dump(), guidance=self.config.guidance)
        with torch.inference_mode():
            if self.config.start == "latents":
                z1 = self.vae.vae.encode(tile.seen)
                z = under_condition(self.flow, z1, own=tile.conditions, target=target, sampler=sampler)
            else:
                noise = fresh_noise(self.flow, tile.ids.tolist(), seed=self.seed).to(tile.cells.library_size.device)
                z = sample_latents(self.flow.dit, noise, target, sampler, self.flow.path)
            out = self.vae.vae.decode(z, tile.cells.library_size)
        counts = draw_sparse(out, tile.ids.tolist(), seed=self.seed)
        return Made(counts=counts, obsm={"X_scldm": z.flatten(1).float().cpu().numpy()}, obs=obs)

    def _target(self, tile: Tile) -> tuple[dict[str, Any], dict[str, Any]]:
        """Class ids as wanted, and what obs says of the change: `to_<label>`; the input's column stays as it was."""
        import torch

        target, obs = dict(tile.conditions), {}
        for name, value in self.config.to.items():
            label = self.vocabulary.label(name)
            new = int(label.encode([value])[0])
            target[name] = torch.full_like(tile.conditions[name], new)
            obs[f"to_{name}"] = [value if value is not None else ""] * len(tile.ids)
        return target, obs


def run(config: PerturbConfig, context: StageContext, pool: Pool | None = None) -> dict[str, Any]:
    """Facts as `run_batches`."""
    models = locate_models(config, context)
    check_target(config, Vocabulary.load(Path(models.vae) / "vocabulary.json"))
    output = Output(genes=True, counts=True, obsm={"X_scldm": latent_width(models.vae)})
    return run_batches(config, context, stage="perturb", output=output, pool=pool)
