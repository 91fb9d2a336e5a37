"""Score real cells: the VAE's negative log-likelihood of their counts, and the flow's likelihood of their latents.

obs of the output holds `nll` (nats, summed over genes), `nll_per_gene` (over the genes that were scored) and, if the
job uses the flow, `flow_log_prob` (nats).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, cast

import numpy as np

from pipeline.config.apply import LogLikelihoodConfig
from pipeline.config.context import StageContext
from pipeline.inference.applier import ApplierSpec, OutputLayout, Tile, TileOutput
from pipeline.inference.apply_job import Pool, run_batches
from pipeline.inference.models import (
    check_likelihood,
    distilled_of,
    flow_start,
    likelihood_problems,
    load_models,
    locate_models,
)
from scldm.errors import InputError

if TYPE_CHECKING:
    import torch


class Scorer:
    """Scores tiles of cells."""

    encodes = True
    synthetic = False

    def __init__(self, spec: ApplierSpec, device: torch.device):
        self.config = cast(LogLikelihoodConfig, spec.config)
        weights = self.config.flow.weights if self.config.flow is not None else "ema"
        self.vae, self.flow = load_models(spec.models, device, weights=weights)
        self.vocabulary, self.seed = self.vae.vocabulary, spec.seed

    def __call__(self, tile: Tile) -> TileOutput:
        import torch

        from scldm.flow.config import SamplerConfig
        from scldm.generation.real_cells import latent_log_prob

        with torch.no_grad():  # not inference_mode: the divergence of the flow is a gradient at these latents
            z = self.vae.vae.encode(tile.seen)
            nll = self.vae.vae.nll(tile.cells, z)
        measured = tile.cells.measured
        scored = self.vocabulary.n_genes if measured is None else measured.sum(1)
        obs = {"nll": nll.float().cpu().numpy(), "nll_per_gene": (nll / scored).float().cpu().numpy()}
        if self.config.flow is not None and self.flow is not None:
            settings = self.config.flow.model_dump()
            labels, probes = settings.pop("labels"), settings.pop("probes")
            log_prob = latent_log_prob(
                self.flow, z, tile.conditions if labels == "own" else {}, tile.ids.tolist(),
                sampler=SamplerConfig(**settings), n_probes=probes, seed=self.seed,
            )  # fmt: skip
            obs["flow_log_prob"] = log_prob.float().cpu().numpy()
        return TileOutput(obs=obs)


def run(config: LogLikelihoodConfig, context: StageContext, pool: Pool | None = None) -> dict[str, Any]:
    """Run the stage; returns the facts of `run_batches`."""
    models = locate_models(config, context)
    check_likelihood(models.vae)
    if models.flow is not None and (
        problems := likelihood_problems(flow_start(models.flow), distilled_of(models.flow))
    ):
        raise InputError("\n".join(problems))
    columns = ("nll", "nll_per_gene", *(("flow_log_prob",) if config.flow is not None else ()))
    layout = OutputLayout(obs=dict.fromkeys(columns, np.float32))
    return run_batches(config, context, stage="log_likelihood", processor=Scorer, layout=layout, pool=pool)
