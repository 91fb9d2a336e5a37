"""Probability paths between noise and data: x_t = alpha(t) x1 + sigma(t) x0.

Convention used everywhere in this package: x0 is noise (t = 0), x1 is data (t = 1), velocity = d x_t / dt. Coefficients
take times of any shape and return that shape; x is (b, ...) and t (b,).
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from scldm.flow.config import PathConfig

PathName = Literal["linear", "gvp", "vp"]


@dataclass(frozen=True)
class PathSample:
    """A point on the path between a noise sample and a cell."""

    x_t: Tensor  # (b, ...)
    velocity: Tensor  # d x_t / dt, the target of a velocity prediction
    x0: Tensor  # the noise, the target of a noise prediction


def times_like(t: Tensor, x: Tensor) -> Tensor:
    """Reshape t (b,) to (b, 1, ...), to multiply x (b, ...)."""
    if t.shape != x.shape[:1]:
        raise ValueError(f"t must have one time per cell, shape {tuple(x.shape[:1])}; got {tuple(t.shape)}")
    return t.view(-1, *[1] * (x.ndim - 1))


class Path(ABC):
    """Coefficients of an interpolant x_t = alpha(t) x1 + sigma(t) x0 with a Gaussian x0."""

    @abstractmethod
    def alpha(self, t: Tensor) -> Tensor:
        """Return the weight of the data at times t."""

    @abstractmethod
    def sigma(self, t: Tensor) -> Tensor:
        """Return the weight of the noise at times t."""

    @abstractmethod
    def d_alpha(self, t: Tensor) -> Tensor:
        """Return the derivative of alpha."""

    @abstractmethod
    def d_sigma(self, t: Tensor) -> Tensor:
        """Return the derivative of sigma."""

    @abstractmethod
    def d_log_alpha(self, t: Tensor) -> Tensor:
        """Return d_alpha / alpha; infinite where the data has no weight."""

    def score_weight(self, t: Tensor) -> Tensor:
        """Return g in velocity = d_log_alpha x + g score."""
        return self.d_log_alpha(t) * self.sigma(t) ** 2 - self.sigma(t) * self.d_sigma(t)

    def sample(self, x0: Tensor, x1: Tensor, t: Tensor) -> PathSample:
        """Interpolate noise x0 (b, ...) and data x1 (b, ...) at times t (b,)."""
        t = times_like(t, x1)
        x_t = self.alpha(t) * x1 + self.sigma(t) * x0
        return PathSample(x_t=x_t, velocity=self.d_alpha(t) * x1 + self.d_sigma(t) * x0, x0=x0)


class LinearPath(Path):
    """alpha = t, sigma = 1 - t."""

    def alpha(self, t: Tensor) -> Tensor:
        return t

    def sigma(self, t: Tensor) -> Tensor:
        return 1 - t

    def d_alpha(self, t: Tensor) -> Tensor:
        return torch.ones_like(t)

    def d_sigma(self, t: Tensor) -> Tensor:
        return -torch.ones_like(t)

    def d_log_alpha(self, t: Tensor) -> Tensor:
        return 1 / t


class GVPPath(Path):
    """alpha = sin(pi t / 2), sigma = cos(pi t / 2): the variance stays that of data and noise."""

    def alpha(self, t: Tensor) -> Tensor:
        return torch.sin(t * math.pi / 2)

    def sigma(self, t: Tensor) -> Tensor:
        return torch.cos(t * math.pi / 2)

    def d_alpha(self, t: Tensor) -> Tensor:
        return math.pi / 2 * torch.cos(t * math.pi / 2)

    def d_sigma(self, t: Tensor) -> Tensor:
        return -math.pi / 2 * torch.sin(t * math.pi / 2)

    def d_log_alpha(self, t: Tensor) -> Tensor:
        return math.pi / (2 * torch.tan(t * math.pi / 2))


class VPPath(Path):
    """Variance-preserving diffusion (Song et al. 2021) in reversed time; beta falls linearly from 20 to 0.1."""

    beta_min = 0.1
    beta_max = 20.0

    def _log_alpha(self, t: Tensor) -> Tensor:
        return -0.25 * (1 - t) ** 2 * (self.beta_max - self.beta_min) - 0.5 * (1 - t) * self.beta_min

    def alpha(self, t: Tensor) -> Tensor:
        return self._log_alpha(t).exp()

    def sigma(self, t: Tensor) -> Tensor:
        return torch.sqrt(-torch.expm1(2 * self._log_alpha(t)))

    def d_alpha(self, t: Tensor) -> Tensor:
        return self.alpha(t) * self.d_log_alpha(t)

    def d_sigma(self, t: Tensor) -> Tensor:
        return -(self.alpha(t) ** 2) * self.d_log_alpha(t) / self.sigma(t)

    def d_log_alpha(self, t: Tensor) -> Tensor:
        return 0.5 * (1 - t) * (self.beta_max - self.beta_min) + 0.5 * self.beta_min

    def score_weight(self, t: Tensor) -> Tensor:
        # The general formula reduces to this; it would divide by sigma = 0 at the data.
        return self.d_log_alpha(t)


PATHS: dict[PathName, Path] = {"linear": LinearPath(), "gvp": GVPPath(), "vp": VPPath()}


def sample_path(x0: Tensor, x1: Tensor, t: Tensor, path: PathName) -> PathSample:
    """Return the points at times t (b,) of the paths from noise x0 to data x1, both (b, ...)."""
    return PATHS[path].sample(x0, x1, t)


def training_interval(config: PathConfig, *, eps: float | None = None) -> tuple[float, float]:
    """Return the times to train on: [0, 1] without a margin at ends where a target or a conversion is infinite.

    Args:
        config: Path and prediction.
        eps: Distance from singular ends; by default 1e-5 for vp, else 1e-3. A velocity on the linear and gvp paths is
            finite everywhere, and is trained on all of [0, 1].
    """
    return _interval(config, eps=(1e-5 if config.path == "vp" else 1e-3) if eps is None else eps)


def sampling_interval(config: PathConfig, *, eps: float | None = None) -> tuple[float, float]:
    """Return the times from noise to data that an ODE solver crosses.

    As `training_interval`, but eps is 1e-3 by default.
    """
    return _interval(config, eps=1e-3 if eps is None else eps)


def _interval(config: PathConfig, *, eps: float) -> tuple[float, float]:
    if config.path == "vp":
        return 0.0, 1 - eps
    return (0.0, 1.0) if config.prediction == "velocity" else (eps, 1 - eps)


def sample_times(n: int, config: PathConfig, *, generator: torch.Generator, device: torch.device) -> Tensor:
    """Draw training times (n,), uniform on the training interval."""
    t0, t1 = training_interval(config)
    return torch.rand(n, generator=generator, device=generator.device).to(device) * (t1 - t0) + t0
