"""Estimate the GPU hours of a stage before it runs: the model's arithmetic over a share of the device's peak.

    hours = 3 x flops of a cell x cells / (GPUs x peak x MFU) / 3600        (training; 1 x for encode)

The arithmetic is exact (`scldm.nn.flops`). The MFU (model flops utilization) is ASSUMED, because none of this code has
been timed on an A100, so an estimate is a range. Its low end is near the one known figure: upstream's Dentate Gyrus VAE
took 2.17 h on one A100, 4.5 % of the bf16 peak by the same arithmetic if those were 500 epochs of 14,570 cells.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from pipeline.planning import sizes
from pipeline.training.throughput import PEAKS
from scldm.flow.config import SamplerConfig
from scldm.nn.config import DiTConfig, VAEConfig
from scldm.nn.flops import TRAINING, dit_flops, encoder_flops, vae_flops

Strategy = Literal["joint", "mutually_exclusive"]
MFU = (0.05, 0.20)  # of the dense bf16 peak; lowest and highest assumed
# Evaluations of the network in a step of a solver. dopri5 chooses its steps itself: `steps` of them is a guess.
EVALUATIONS = {"euler": 1, "midpoint": 2, "heun": 2, "heun3": 3, "rk4": 4, "adams": 1, "dopri5": 6}
STARTING = {"adams": 2}  # additional evaluations in its first steps


@dataclass(frozen=True)
class Estimate:
    """Arithmetic and time of one stage."""

    flops: float
    gpus: int
    hours: tuple[float, float]  # wall time: lowest, highest

    def __str__(self) -> str:
        low, high = self.hours
        gpus = f"{self.gpus} A100" + ("s" if self.gpus > 1 else "")
        return (
            f"about {format_hours(low)} to {format_hours(high)} on {gpus}, {self.gpu_hours} GPU hours "
            f"(bf16, {MFU[0]:.0%} to {MFU[1]:.0%} of the peak assumed: not measured on an A100)"
        )

    @property
    def gpu_hours(self) -> str:
        """Hours times GPUs, as text."""
        low, high = (f"{self.gpus * h:,.0f}" if self.gpus * h >= 10 else f"{self.gpus * h:.1f}" for h in self.hours)
        return low if low == high else f"{low} to {high}"


def estimate(flops: float, gpus: int, *, peak: float | None = None) -> Estimate:
    """Estimate the time that a number of operations takes.

    Args:
        flops: Operations of the whole stage.
        peak: Operations per second of one device; the A100's in bf16 if None.
    """
    peak = peak or PEAKS["A100"][0] or 0.0
    high, low = (flops / (gpus * peak * mfu) / 3600 for mfu in MFU)
    return Estimate(flops, gpus, (low, high))


def train_vae_flops(model: VAEConfig, *, cells: float, n_genes: int, scored: int | None, expressed: float) -> float:
    """Count the operations of training the VAE.

    Args:
        cells: Steps x batch size.
        scored: `train.genes_per_step`; None scores all genes.
        expressed: Mean number of expressed genes in a cell.
    """
    return TRAINING * cells * vae_flops(model, n_genes=min(scored or n_genes, n_genes), expressed=expressed)


def encode_flops(model: VAEConfig, *, cells: float, expressed: float) -> float:
    """Count the operations of encoding; no genes are decoded."""
    return cells * encoder_flops(model, expressed=expressed)


def train_flow_flops(model: DiTConfig, *, cells: float, n_latent_tokens: int, latent_width: int) -> float:
    """Count the operations of training the flow on `cells` cells (steps x batch size)."""
    return TRAINING * cells * dit_flops(model, n_latent_tokens=n_latent_tokens, latent_width=latent_width)


def generate_flops(
    flow: DiTConfig,
    vae: VAEConfig,
    sampler: SamplerConfig,
    *,
    cells: float,
    n_genes: int,
    start: Literal["noise", "control"] = "noise",
) -> float:
    """Count the operations of generation: the solver's evaluations, and one decoding of all genes."""
    evaluations = generation_evaluations(sampler, flow.strategy, start)
    step = dit_flops(flow, n_latent_tokens=vae.n_latent_tokens, latent_width=vae.latent_width)
    return cells * (evaluations * step + vae_flops(vae, n_genes=n_genes, expressed=0))


def generation_evaluations(sampler: SamplerConfig, strategy: Strategy, start: Literal["noise", "control"]) -> int:
    """Count the evaluations of the network that make a cell; of dopri5, which chooses its steps, a guess.

    Guidance other than 0 or 1 takes two outputs, and one more for each label with a scale of its own. By way of
    control cells there are two ways, of which the first is not guided.
    """
    once = sampler.steps * EVALUATIONS[sampler.solver] + STARTING.get(sampler.solver, 0)
    return once * (network_outputs(sampler.guidance, strategy) + (1 if start == "control" else 0))


def network_outputs(guidance: Mapping[str, float] | float, strategy: Strategy) -> int:
    """Count the outputs of the network in an evaluation of the guided field of cells with all labels."""
    if not isinstance(guidance, Mapping):
        return 1 if guidance in (0.0, 1.0) else 2
    from scldm.flow.guidance import JOINT, guidance_terms

    # A label more than have a scale: then all labels together are not one of them.
    labels = [*(x for x in guidance if x != JOINT), *([""] if JOINT in guidance else [])]
    try:
        return len(guidance_terms(labels, guidance, strategy=strategy))
    except ValueError:  # rows may set others; generate refuses those that do not
        return len(labels) + 1


def stage_estimate(
    stage: str, config: Any, vae: Any, data: sizes.DataFacts, gpus: int, flow: Any = None
) -> Estimate | None:
    """Estimate a stage; None if it needs no GPU, or if cells, genes or models are not known yet.

    Args:
        config: Settings of the stage.
        vae: Settings of train_vae.
        gpus: Number of GPUs that work on the stage.
        flow: Settings of train_flow; for generate.
    """
    genes = sizes.expressed_genes(data)
    if stage == "train_vae" and config.pretrained is None and data.n_genes is not None:
        cells = config.train.max_steps * config.train.feed.batch_size
        scored = config.train.genes_per_step
        flops = train_vae_flops(config.model, cells=cells, n_genes=data.n_genes, scored=scored, expressed=genes)
    elif stage == "encode" and vae is not None and data.n_cells is not None:
        cells = sum(data.n_cells.get(split, 0) for split in set(config.splits))
        flops = encode_flops(vae.model, cells=cells, expressed=genes)
    elif stage == "train_flow" and vae is not None and not config.vae.train:
        cells = config.train.max_steps * config.train.feed.batch_size
        m, e = vae.model.n_latent_tokens, vae.model.latent_width
        flops = train_flow_flops(config.model, cells=cells, n_latent_tokens=m, latent_width=e)
    elif stage == "generate" and vae is not None and flow is not None and data.n_genes is not None:
        n = sizes.generated_cells(config, data)
        if n is None:
            return None
        flops = generate_flops(flow.model, vae.model, config.sampler, cells=n, n_genes=data.n_genes, start=config.start)
    else:
        return None
    return estimate(flops, gpus)


def format_hours(hours: float) -> str:
    if hours < 1:
        return f"{max(1, round(60 * hours))} min"
    return f"{hours:.1f} h" if hours < 10 else f"{hours:.0f} h"
