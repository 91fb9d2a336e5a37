"""Settings of the flow: path, prediction, loss weight, solver, guidance."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from pydantic import (
    Field,
    PositiveFloat,
    PositiveInt,
    SerializerFunctionWrapHandler,
    model_serializer,
    model_validator,
)

from scldm.config import StrictModel

Solver = Literal["euler", "midpoint", "heun", "heun3", "rk4", "adams", "dopri5"]


class PathConfig(StrictModel):
    """How noise (t = 0) turns into data (t = 1), and what the network predicts."""

    path: Literal["linear", "gvp", "vp"] = "linear"
    """Interpolant."""
    prediction: Literal["velocity", "score", "noise"] = "velocity"
    """What the network's output means."""
    weight: Literal["none", "velocity", "likelihood"] = "none"
    """Loss weight over time, of a score or noise prediction."""

    @model_validator(mode="after")
    def _velocity_has_no_weight(self) -> PathConfig:
        if self.prediction == "velocity" and self.weight != "none":
            raise ValueError(f"weight ({self.weight}) is for score and noise predictions; velocity allows only none")
        return self


class ControlStart(StrictModel):
    """What a flow was trained from beside noise, as its model folder records it."""

    label: str
    """The label of the treatment."""
    control: str
    """Its control class: cells start at the latents of control cells with the same other labels."""
    share: float = Field(gt=0, le=1)
    """Share of the training cells that started there; 1: none started at noise."""


class Distilled(StrictModel):
    """What a distilled flow is, as its model folder records it: its network predicts jumps, and no velocity."""

    evaluations: Literal[1, 2, 4]
    """Evaluations of the network that make a cell: as many jumps of equal length, from noise to data."""
    guidance: dict[str, float] | float
    """Guidance that was trained in, as SamplerConfig.guidance."""
    teacher: str
    """Digest of the model folder of the flow that it was distilled from."""


class SamplerConfig(StrictModel):
    """How latents are drawn from the trained flow."""

    solver: Solver = "adams"
    """ODE solver. dopri5 is adaptive and uses rtol and atol; the others take exactly `steps` steps. adams evaluates the
    network once a step, and twice more in the first. benchmarks/README.md has the error of each. A distilled flow makes
    its own jumps in place of the default solver and steps, and takes no others."""
    steps: PositiveInt = 14
    """Steps of a fixed-step solver. 14 of adams are 16 evaluations."""
    rtol: PositiveFloat = 1e-5
    """Relative tolerance of dopri5."""
    atol: PositiveFloat = 1e-5
    """Absolute tolerance of dopri5."""
    guidance: dict[str, float] | float = 1.0
    """Scale w in v = v_null + w (v_cond - v_null). One number, or one per label. Joint labels have one scale, and may
    have scales of their own beside it: {"*": 1, cytokine: 0.5} adds 0.5 (v_cytokine - v_null), where "*" is the scale
    of all labels together (0: only the sum over single ones) and labels left out have 0. 1 halves the cost of any
    other; each label with a scale costs one more evaluation."""
    weights: Literal["ema", "raw"] = "ema"
    """Which weights of the DiT are used."""
    temperature: PositiveFloat = 1.0
    """Of the draw of counts: Var = mu + temperature mu^2 / theta, same means. 1: the model's negative binomial; near 0:
    a Poisson."""
    expression: Literal["mean", "draw"] = "mean"
    """Of a Gaussian head, which alone has it: the mean of log1p CP10k, or a draw of Normal(mean, 1), as upstream's."""

    @model_serializer(mode="wrap")
    def _without_the_default_expression(self, to_dict: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Keep the versions of stages from before this setting existed."""
        return {k: v for k, v in to_dict(self).items() if (k, v) != ("expression", "mean")}


def shown_guidance(guidance: Mapping[str, float] | float) -> str:
    """Return guidance as text."""
    if not isinstance(guidance, Mapping):
        return f"{guidance:g}"
    return ", ".join(f"{label} {w:g}" for label, w in sorted(guidance.items()))
