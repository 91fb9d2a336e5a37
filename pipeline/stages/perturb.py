"""Predict real cells under another condition: what would this cell be if it had another label?

From latents, the flow is integrated backwards to the noise that the cell comes from, and forwards under the new labels,
so that the cell keeps what its labels do not explain. From noise, a new cell is made with its labels and library size.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from pipeline.config.apply import PerturbConfig
from pipeline.config.context import StageContext
from pipeline.inference.applier import ApplierSpec, OutputLayout, Tile, TileOutput, Values
from pipeline.inference.apply_job import Pool, run_batches
from pipeline.inference.models import check_target, draws_counts, latent_width, load_models, locate_models, target_class
from scldm.data.vocabulary import Vocabulary

if TYPE_CHECKING:
    import torch
    from torch import Tensor


class Perturber:
    """Moves tiles of cells to another condition."""

    synthetic = True

    def __init__(self, spec: ApplierSpec, device: torch.device):
        self.config = cast(PerturbConfig, spec.config)
        self.vae, flow = load_models(spec.models, device, weights=self.config.flow.weights)
        from scldm.generation.asked_values import with_values

        assert flow is not None  # the config requires one
        self.to = {k: target_class(flow.vocabulary, k, v) for k, v in self.config.to.items()}
        self.flow = with_values(flow, [self.to])
        self.encodes = self.config.start == "latents"
        self.vocabulary, self.seed = self.vae.vocabulary, spec.seed

    def __call__(self, tile: Tile) -> TileOutput:
        import torch

        from scldm.flow.config import SamplerConfig
        from scldm.flow.sampler import sample_latents
        from scldm.generation.real_cells import draw_sparse, fresh_noise, under_condition

        own = self._own(tile)
        target, obs = self._target(own, len(tile.ids))
        sampler = SamplerConfig(**self.config.flow.model_dump(), guidance=self.config.guidance)
        with torch.inference_mode():
            if self.config.start == "latents":
                z1 = self.vae.vae.encode(tile.seen)
                z = under_condition(self.flow, z1, own=own, target=target, sampler=sampler)
            else:
                noise = fresh_noise(self.flow, tile.ids.tolist(), seed=self.seed).to(tile.cells.library_size.device)
                z = sample_latents(self.flow.dit, noise, target, sampler, self.flow.path)
            out = self.vae.vae.decode(z, tile.cells.library_size)
        values = draw_sparse(out, tile.ids.tolist(), seed=self.seed)
        return TileOutput(values=values, obsm={"X_scldm": z.flatten(1).float().cpu().numpy()}, obs=obs)

    def _own(self, tile: Tile) -> dict[str, Tensor]:
        """Return the cells' own class ids, with the null ids of the vocabulary that `to` may have extended."""
        import torch

        ids = {}
        for name, given in tile.conditions.items():
            before, now = self.vocabulary.label(name).null_id, self.flow.vocabulary.label(name).null_id
            ids[name] = given if before == now else torch.where(given == before, now, given)
        return ids

    def _target(self, own: dict[str, Tensor], n_cells: int) -> tuple[dict[str, Tensor], dict[str, list[str]]]:
        """Return the requested class ids, and the columns `to_<label>` of obs; the input's own columns stay."""
        import torch

        target, obs = dict(own), {}
        for name, value in self.to.items():
            new = int(self.flow.vocabulary.label(name).encode([value])[0])
            target[name] = torch.full_like(own[name], new)
            obs[f"to_{name}"] = [value if value is not None else ""] * n_cells
        return target, obs


def run(config: PerturbConfig, context: StageContext, pool: Pool | None = None) -> dict[str, Any]:
    """Run the stage; returns the facts of `run_batches`."""
    from scldm.generation.asked_values import value_notes  # imports torch

    models = locate_models(config, context)
    vocabulary = Vocabulary.load(Path(models.vae) / "vocabulary.json")
    check_target(config, vocabulary)
    values: Values = "counts" if draws_counts(models.vae) else "log1p_cp10k"
    layout = OutputLayout(genes=True, values=values, obsm={"X_scldm": latent_width(models.vae)},
                          obs={f"to_{label}": object for label in config.to})  # fmt: skip
    facts = run_batches(config, context, stage="perturb", processor=Perturber, layout=layout, pool=pool)
    notes = value_notes(vocabulary, [{k: target_class(vocabulary, k, v) for k, v in config.to.items()}])
    return facts | {"notes": [*facts["notes"], *notes]}
