"""Estimate the GPU hours of a stage before it runs: the model's arithmetic and its kernel launches.

    at best     step = max(launches x 4 us, flops / (peak x best share))       hours = steps x step / 3600
    at worst    step = launches x 10 us + flops / (peak x worst share)         MFU = flops / (peak x step)

flops: of a step on one GPU, 3 x those of the forward pass in training. They are exact (`scldm.nn.flops`), and the
launches of eager execution are counted (`pipeline.planning.launches`). The peak is an A100's in the precision in use.
The shares of it that kernels reach at these widths, and the time of a launch, are ASSUMED: none of this code has been
timed on an A100. So an estimate is a range; `make gpu` measures. One figure is known: upstream's Dentate Gyrus VAE took
2.17 h on one A100, 4.5 % of the bf16 peak by the same arithmetic if those were 500 epochs of 14,570 cells.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

from pipeline.config.resources import ResourcesConfig
from pipeline.planning import launches as counts
from pipeline.planning import sizes
from pipeline.training.throughput import PEAKS
from scldm.flow.config import SamplerConfig
from scldm.nn.config import DiTConfig, VAEConfig
from scldm.nn.flops import TRAINING, dit_flops, encoder_flops, vae_flops

Strategy = Literal["joint", "mutually_exclusive"]
# Share of the dense peak that kernels reach, at worst and at best: products at widths of 256 to 1,024, the decoder's
# recomputation and what only moves memory among them. The lower the peak, the nearer they come.
SHARES = {"bf16": (0.08, 0.40), "tf32": (0.15, 0.50), "fp32": (0.40, 0.75)}
LAUNCH_SECONDS = (10e-6, 4e-6)  # of a kernel from Python, at worst and at best
GENERATED_TOGETHER = 1024  # cells, on a GPU
# Evaluations of the network in a step of a solver. dopri5 chooses its steps itself: `steps` of them is a guess.
EVALUATIONS = {"euler": 1, "midpoint": 2, "heun": 2, "heun3": 3, "rk4": 4, "adams": 1, "dopri5": 6}
STARTING = {"adams": 2}  # additional evaluations in its first steps


@dataclass(frozen=True)
class Estimate:
    """Arithmetic, time and price of one stage."""

    flops: float
    gpus: int
    hours: tuple[float, float]  # wall time: lowest, highest
    precision: str = "bf16"
    price: float | None = None  # of a GPU for an hour

    def __str__(self) -> str:
        low, high = self.hours
        gpus = f"{self.gpus} A100" + ("s" if self.gpus > 1 else "")
        share = _span(*(100 * m for m in self.mfu))
        text = (
            f"about {format_hours(low)} to {format_hours(high)} on {gpus}, {self.gpu_hours} GPU hours "
            f"({self.precision}, {share} % of its peak: by launches and assumed speeds, not measured on an A100)"
        )
        if self.price is None:
            return text
        return f"{text}; {_span(*(self.gpus * h * self.price for h in self.hours))} at {self.price:g} a GPU hour"

    @property
    def gpu_hours(self) -> str:
        """Hours times GPUs, as text."""
        return _span(*(self.gpus * h for h in self.hours))

    @property
    def mfu(self) -> tuple[float, float]:
        """Lowest and highest share of the peak that the model's arithmetic takes (model flops utilization)."""
        low, high = (self.flops / (self.gpus * h * 3600 * PEAKS["A100"][self.precision]) for h in reversed(self.hours))
        return low, high


def _span(low: float, high: float) -> str:
    shown = [f"{x:,.0f}" if x >= 10 else f"{x:.1f}" for x in (low, high)]
    return shown[0] if shown[0] == shown[1] else f"{shown[0]} to {shown[1]}"


def estimate(flops: float, gpus: int, *, precision: str = "bf16", launches: float = 0.0) -> Estimate:
    """Estimate the time that a number of operations takes on A100s.

    Args:
        flops: Operations of the whole stage.
        precision: Of its products: fp32, tf32 or bf16.
        launches: Kernels that each of the GPUs is asked to start in the whole stage.
    """
    peak, (worst, best) = PEAKS["A100"][precision], SHARES[precision]
    slow, fast = (launches * seconds for seconds in LAUNCH_SECONDS)
    low = max(fast, flops / (gpus * peak * best))
    high = slow + flops / (gpus * peak * worst)
    return Estimate(flops, gpus, (low / 3600, high / 3600), precision)


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
    stage: str, config: Any, vae: Any, data: sizes.DataFacts, resources: ResourcesConfig, flow: Any = None
) -> Estimate | None:
    """Estimate a stage; None if it needs no GPU, or if cells, genes or models are not known yet.

    Args:
        config: Settings of the stage.
        resources: Of the job: its GPUs, and what one costs for an hour.
        flow: Settings of train_flow; for generate.
    """
    found = None
    step = training_step(stage, config, vae, data, resources)
    if step is not None:
        found = _training(config, _training_flops(stage, config, vae, data), step, resources)
    elif stage == "encode" and vae is not None and data.n_cells is not None:
        found = _encode(config, vae.model, data, resources)
    elif stage == "generate" and vae is not None and flow is not None and data.n_genes is not None:
        found = _generate(config, vae.model, flow.model, data, resources)
    return None if found is None else replace(found, price=resources.gpu_hour_price)


def _actor_gpus(resources: ResourcesConfig) -> int:
    return max(1, round(resources.actors_max * resources.gpus_per_worker))


def inference_precision(config: Any) -> str:
    """Return the precision that encode or generate is priced by: that of its settings, or the default on an A100.

    The adaptive solver's default is fp32 (`scldm.nn.kernels.precision.resolve`).
    """
    if config.precision is not None:
        return str(config.precision)
    return "fp32" if getattr(getattr(config, "sampler", None), "solver", None) == "dopri5" else "bf16"


@dataclass(frozen=True)
class TrainingStep:
    """What a GPU does in a step of a training."""

    cells: int  # of a micro batch
    micro_batches: int
    launches: float  # of a micro batch

    def __str__(self) -> str:
        return (
            f"about {self.micro_batches * self.launches:,.0f} kernel launches a step on each GPU, "
            f"{self.micro_batches} x {self.launches:,.0f} for {self.cells} cells (larger micro batches take fewer)"
        )


def training_step(
    stage: str, config: Any, vae: Any, data: sizes.DataFacts, resources: ResourcesConfig
) -> TrainingStep | None:
    """Count the launches of a step; None if genes or models are not known, and for other stages than trainings."""
    if stage == "train_vae" and config.pretrained is None and data.n_genes is not None:
        cells, rounds = sizes.micro_batches(config.train, resources.workers.max)
        scored = min(config.train.genes_per_step or data.n_genes, data.n_genes)
        return TrainingStep(
            cells, rounds,
            counts.vae_step_launches(config.model, cells=cells, n_genes=scored, precision=config.train.precision),
        )  # fmt: skip
    if stage == "train_flow" and vae is not None and not config.vae.train:
        cells, rounds = sizes.micro_batches(config.train, resources.workers.max)
        return TrainingStep(
            cells, rounds, counts.dit_step_launches(config.model, precision=config.train.precision)
        )  # fmt: skip
    return None


def _training_flops(stage: str, config: Any, vae: Any, data: sizes.DataFacts) -> float:
    cells = config.train.max_steps * config.train.feed.batch_size
    if stage == "train_vae":
        return train_vae_flops(
            config.model, cells=cells, n_genes=data.n_genes or 0, scored=config.train.genes_per_step,
            expressed=sizes.expressed_genes(data),
        )  # fmt: skip
    m, e = vae.model.n_latent_tokens, vae.model.latent_width
    return train_flow_flops(config.model, cells=cells, n_latent_tokens=m, latent_width=e)


def _training(config: Any, flops: float, step: TrainingStep, resources: ResourcesConfig) -> Estimate:
    launches = config.train.max_steps * step.micro_batches * step.launches
    return estimate(flops, resources.workers.max, precision=config.train.precision, launches=launches)


def _encode(config: Any, vae: VAEConfig, data: sizes.DataFacts, resources: ResourcesConfig) -> Estimate:
    assert data.n_cells is not None  # the caller looked
    cells = sum(data.n_cells.get(split, 0) for split in set(config.splits))
    gpus, precision = _actor_gpus(resources), inference_precision(config)
    flops = encode_flops(vae, cells=cells, expressed=sizes.expressed_genes(data))
    batches = cells / (gpus * config.batch_size)
    return estimate(
        flops, gpus, precision=precision, launches=batches * counts.encode_launches(vae, precision=precision)
    )


def _generate(
    config: Any, vae: VAEConfig, flow: DiTConfig, data: sizes.DataFacts, resources: ResourcesConfig
) -> Estimate | None:
    n = sizes.generated_cells(config, data)
    if n is None or data.n_genes is None:
        return None
    gpus, precision = _actor_gpus(resources), inference_precision(config)
    flops = generate_flops(flow, vae, config.sampler, cells=n, n_genes=data.n_genes, start=config.start)
    each = counts.generate_launches(
        flow, vae, evaluations=generation_evaluations(config.sampler, flow.strategy, config.start),
        cells=GENERATED_TOGETHER, n_genes=data.n_genes, precision=precision,
    )  # fmt: skip
    return estimate(flops, gpus, precision=precision, launches=n / (gpus * GENERATED_TOGETHER) * each)


def format_hours(hours: float) -> str:
    if hours < 1:
        return f"{max(1, round(60 * hours))} min"
    return f"{hours:.1f} h" if hours < 10 else f"{hours:.0f} h"
