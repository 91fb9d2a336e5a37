"""Meaning and loss of a network's prediction.

A network predicts the velocity, the score, or the noise x0; each determines the others at (x_t, t). Predictions, x and
samples are (b, ...), t is (b,).
"""

from __future__ import annotations

from torch import Tensor

from scldm.flow.config import PathConfig
from scldm.flow.path import PATHS, PathSample, times_like


def to_velocity(prediction: Tensor, x: Tensor, t: Tensor, config: PathConfig) -> Tensor:
    """Return the velocity d x_t / dt that a prediction at (x, t) implies."""
    if config.prediction == "velocity":
        return prediction
    path, times = PATHS[config.path], times_like(t, x)
    return path.d_log_alpha(times) * x + path.score_weight(times) * to_score(prediction, x, t, config)


def to_score(prediction: Tensor, x: Tensor, t: Tensor, config: PathConfig) -> Tensor:
    """Return the score, grad_x log p_t(x), that a prediction at (x, t) implies."""
    if config.prediction == "score":
        return prediction
    return -to_noise(prediction, x, t, config) / PATHS[config.path].sigma(times_like(t, x))


def to_noise(prediction: Tensor, x: Tensor, t: Tensor, config: PathConfig) -> Tensor:
    """Return the expected noise x0 that a prediction at (x, t) implies."""
    if config.prediction == "noise":
        return prediction
    path, t = PATHS[config.path], times_like(t, x)
    if config.prediction == "score":
        return -path.sigma(t) * prediction
    # Solves x = alpha x1 + sigma x0 and v = d_alpha x1 + d_sigma x0 for x0; no division by a vanishing coefficient.
    determinant = path.alpha(t) * path.d_sigma(t) - path.d_alpha(t) * path.sigma(t)
    return (path.alpha(t) * prediction - path.d_alpha(t) * x) / determinant


def flow_loss(prediction: Tensor, sample: PathSample, t: Tensor, config: PathConfig) -> Tensor:
    """Return the loss of each cell, (b,): weighted squared error, mean over tokens and widths.

    Errors of score and noise predictions are both measured in units of the noise. Their weight makes them the error of
    the velocity (`velocity`) or the maximum-likelihood weight (`likelihood`). A velocity prediction has none: its
    error is that of the velocity already, and `PathConfig` refuses a weight for it.

    Args:
        prediction: The network's output at (sample.x_t, t), (b, ...).
        sample: Point of the path, with its targets.
        t: Times, (b,).
        config: Path, prediction and weight.
    """
    if prediction.shape != sample.x_t.shape:
        raise ValueError(f"prediction has shape {tuple(prediction.shape)}; x_t has {tuple(sample.x_t.shape)}")
    if config.prediction == "velocity":
        return _mean_square(prediction - sample.velocity)
    if config.prediction == "noise":
        return _weight(t, config) * _mean_square(prediction - sample.x0)
    sigma = PATHS[config.path].sigma(times_like(t, prediction))
    return _weight(t, config) * _mean_square(prediction * sigma + sample.x0)


def _mean_square(error: Tensor) -> Tensor:
    return error.square().flatten(1).mean(dim=1)  # (b,)


def _weight(t: Tensor, config: PathConfig) -> Tensor | float:
    path = PATHS[config.path]
    if config.weight == "velocity":
        return (path.score_weight(t) / path.sigma(t)) ** 2
    if config.weight == "likelihood":
        return path.score_weight(t) / path.sigma(t) ** 2
    return 1.0
