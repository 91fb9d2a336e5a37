"""Settings of the optimizer and of the learning-rate schedule."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, PositiveFloat, PositiveInt

from scldm.config import StrictModel


class OptimizerConfig(StrictModel):
    """AdamW with a warm-up, hold, decay schedule. The learning rate is never scaled by the number of workers."""

    lr: PositiveFloat = 1e-3
    """Peak learning rate."""
    betas: tuple[float, float] = (0.9, 0.95)
    """Adam's moment decays."""
    weight_decay: float = Field(0.0, ge=0)
    """Decoupled weight decay."""
    cautious: bool = False
    """Skip the coordinates whose update disagrees in sign with the gradient."""
    warmup: float = Field(0.1, ge=0, lt=1)
    """Fraction of max_steps for the linear warm-up."""
    decay: float = Field(0.3, ge=0, le=1)
    """Fraction of max_steps for the final decay."""
    decay_type: Literal["cosine", "sqrt"] = "cosine"
    """Shape of the decay."""
    final_factor: float = Field(0.05, ge=0, le=1)
    """Learning rate at the end, relative to the peak."""
    clip: PositiveFloat = 10.0
    """Gradient norm above which gradients are scaled down."""


class EMAConfig(StrictModel):
    """Exponential moving average of the weights, kept in fp32."""

    decay: float = Field(0.999, gt=0, lt=1)
    """Decay once warm."""
    every: PositiveInt = 1
    """Update once every so many optimizer steps."""
    start: int = Field(0, ge=0)
    """Before this step the average is a plain copy; after it the decay warms up as 1 - (1 + k)^(-2/3)."""


class LoraConfig(StrictModel):
    """Low-rank adapters on the linear layers of attention and SwiGLU; merged into the weights at the end."""

    rank: PositiveInt = 8
    """Rank of an adapter."""
    alpha: PositiveFloat | None = None
    """An adapter is scaled by alpha / rank; null: by 1."""

    @property
    def scale(self) -> float:
        """Factor of B A."""
        return 1.0 if self.alpha is None else self.alpha / self.rank
