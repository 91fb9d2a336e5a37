"""Hours and money of a job before it runs: arithmetic of the model, a share of the device's peak, a price.

    hours = 3 x flops of a cell x cells x steps' share / (workers x peak x MFU) / 3600       (training; 1 x for encode)
    cost  = hours x nodes x price of a node

The arithmetic is exact (`scldm.nn.flops`); the MFU is ASSUMED: none of our code has run on a GPU, so all is a
range. Its low end is near the one figure that is known: upstream's Dentate Gyrus VAE took 2.17 h on one A100, which is
4.5 % of the bf16 peak by the same arithmetic if those were 500 epochs of 14,570 cells. Prices are examples.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from pipeline.planning import sizes
from pipeline.training.callbacks.throughput import PEAKS
from scldm.flow.config import SamplerConfig
from scldm.nn.config import DiTConfig, VAEConfig
from scldm.nn.flops import TRAINING, dit_flops, vae_flops

MFU = (0.05, 0.20)  # of the dense bf16 peak; lowest and highest assumed
GPUS_PER_NODE = 8
# Dollars an hour for 8 A100s, on demand, list prices of 2024 as remembered: not looked up, and they have moved since.
PRICES = {"p4d.24xlarge": 32.8, "p4de.24xlarge": 41.0, "a2-highgpu-8g": 29.4, "a2-ultragpu-8g": 40.5}
NODE = "p4d.24xlarge"
# Evaluations of the network in a step of a solver. dopri5 chooses its steps itself: `steps` of them is a guess.
EVALUATIONS = {"euler": 1, "midpoint": 2, "heun": 2, "heun3": 3, "rk4": 4, "adams": 1, "dopri5": 6}
STARTING = {"adams": 2}  # evaluations more, of its first steps


@dataclass(frozen=True)
class Estimate:
    """Of one stage: hours and dollars, each (lowest, highest)."""

    flops: float
    hours: tuple[float, float]
    dollars: tuple[float, float]
    nodes: int

    def __str__(self) -> str:
        low, high = self.hours
        nodes = f"{self.nodes} {NODE}" + ("s" if self.nodes > 1 else "")
        return (
            f"about {_hours(low)} to {_hours(high)} on {nodes}, ${self.dollars[0]:,.0f} to ${self.dollars[1]:,.0f} "
            f"(bf16, {MFU[0]:.0%} to {MFU[1]:.0%} of the peak assumed: not measured on a GPU)"
        )


def estimate(flops: float, gpus: int, *, peak: float | None = None, price: float = PRICES[NODE]) -> Estimate:
    """Of so many operations on so many A100s.

    Args:
        flops: Of the whole stage.
        peak: Operations per second of one device; the A100's in bf16 if None.
        price: Of a node, an hour.
    """
    peak = peak or PEAKS["A100"][0] or 0.0
    nodes = -(-gpus // GPUS_PER_NODE)
    high, low = (flops / (gpus * peak * mfu) / 3600 for mfu in MFU)
    return Estimate(flops, (low, high), (low * nodes * price, high * nodes * price), nodes)


def train_vae_flops(model: VAEConfig, *, cells: float, n_genes: int, scored: int | None, expressed: float) -> float:
    """Operations of training on `cells` cells (steps x batch).

    Args:
        scored: `train.genes_per_step`; None scores all.
    """
    return TRAINING * cells * vae_flops(model, n_genes=min(scored or n_genes, n_genes), expressed=expressed)


def encode_flops(model: VAEConfig, *, cells: float, expressed: float) -> float:
    """The encoder's half of the blocks, and pooling; no genes are decoded."""
    pooling = vae_flops(model.model_copy(update={"n_layers": 0}), n_genes=0, expressed=expressed)
    return cells * (pooling + (vae_flops(model, n_genes=0, expressed=expressed) - pooling) / 2)


def train_flow_flops(model: DiTConfig, *, cells: float, n_latent_tokens: int, latent_width: int) -> float:
    return TRAINING * cells * dit_flops(model, n_latent_tokens=n_latent_tokens, latent_width=latent_width)


def generate_flops(flow: DiTConfig, vae: VAEConfig, sampler: SamplerConfig, *, cells: float, n_genes: int) -> float:
    """Network evaluations of the solver, twice where guidance is neither 0 nor 1, and one decoding of all genes."""
    plain = sampler.guidance in (0.0, 1.0)
    once = sampler.steps * EVALUATIONS[sampler.solver] + STARTING.get(sampler.solver, 0)
    evaluations = once * (1 if plain else 2)
    step = dit_flops(flow, n_latent_tokens=vae.n_latent_tokens, latent_width=vae.latent_width)
    return cells * (evaluations * step + vae_flops(vae, n_genes=n_genes, expressed=0))


def stage_estimate(
    stage: str, config: Any, vae: Any, data: sizes.DataFacts, gpus: int, flow: Any = None
) -> Estimate | None:
    """Of a stage as its job sets it up; None for what needs no GPU, or where cells, genes or models are not known yet.

    Args:
        config: Settings of the stage.
        vae: Those of train_vae.
        gpus: That work at it.
        flow: Those of train_flow; for generate.
    """
    genes = sizes.expressed_genes(data)
    if stage == "train_vae" and data.n_genes is not None:
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
        flops = generate_flops(flow.model, vae.model, config.sampler, cells=n, n_genes=data.n_genes)
    else:
        return None
    return estimate(flops, gpus)


CENSUS_CELLS, CENSUS_GENES, CENSUS_EXPRESSED = 33e6, 36_130, 2_000


def paper_table() -> str:
    """The table of docs/operations.md, in Markdown: one epoch of the Census models, and what follows from them."""
    from scldm.api.presets import preset

    rows = []
    for name in ("census_20m", "census_70m", "census_270m"):
        model = preset(name).vae.model  # type: ignore[union-attr]
        for scored, words in ((None, "all genes scored"), (8192, "8,192 genes a step")):
            flops = train_vae_flops(
                model, cells=CENSUS_CELLS, n_genes=CENSUS_GENES, scored=scored, expressed=CENSUS_EXPRESSED
            )
            rows.append((f"train_vae, {name}, an epoch of 33 M cells, {words}", estimate(flops, 16)))
    vae = preset("census_70m").vae.model  # type: ignore[union-attr]
    flow = DiTConfig(d_model=512, n_layers=12, n_heads=8)
    m, e = vae.n_latent_tokens, vae.latent_width
    rows.append(
        ("encode, census_70m, 33 M cells", estimate(encode_flops(vae, cells=33e6, expressed=CENSUS_EXPRESSED), 16))
    )
    flops = train_flow_flops(flow, cells=CENSUS_CELLS, n_latent_tokens=m, latent_width=e)
    rows.append(("train_flow, jobs/census, an epoch of 33 M cells", estimate(flops, 16)))
    for guidance in (1.0, 2.0):
        sampler = SamplerConfig(guidance=guidance)
        flops = generate_flops(flow, vae, sampler, cells=1e6, n_genes=CENSUS_GENES)
        solver = f"{sampler.solver} x {sampler.steps}"
        rows.append((f"generate, a million cells, {solver}, guidance {guidance:g}", estimate(flops, 16)))
    dentate = preset("dentate_gyrus").vae
    assert dentate is not None
    flops = train_vae_flops(dentate.model, cells=500 * 13_113, n_genes=17_002, scored=None, expressed=1_500)
    rows.append(("train_vae, dentate_gyrus, 500 epochs of 13,113 cells", estimate(flops, 8)))
    lines = ["| what | PFLOP | A100s | hours | dollars |", "|---|---|---|---|---|"]
    for what, found in rows:
        hours, dollars = (
            " – ".join(f(x) for x in pair) for f, pair in ((_hours, found.hours), (_dollars, found.dollars))
        )
        lines.append(f"| {what} | {found.flops / 1e15:,.0f} | {found.nodes * GPUS_PER_NODE} | {hours} | {dollars} |")
    return "\n".join(lines)


def _dollars(dollars: float) -> str:
    return f"{dollars:,.0f}"


def _hours(hours: float) -> str:
    if hours < 1:
        return f"{max(1, round(60 * hours))} min"
    return f"{hours:.1f} h" if hours < 10 else f"{hours:.0f} h"
