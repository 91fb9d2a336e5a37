"""The small field and the names that upstream's recorded transports use."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from helpers.models.upstream_fixtures import Fixture
from scldm.flow.config import PathConfig

PATH_NAMES = {"Linear": "linear", "GVP": "gvp", "VP": "vp"}
DIFFUSION_NAMES = {
    "SBDM": "sbdm",
    "constant": "constant",
    "sigma": "sigma",
    "linear": "linear",
    "decreasing": "decreasing",
    "inccreasing-decreasing": "increasing_decreasing",
}


def toy_field(fixture: Fixture) -> Callable[[Tensor, Tensor], Tensor]:
    weight, bias = fixture["in/W"], fixture["in/b"]
    return lambda x, t: torch.tanh(x @ weight) + t[:, None, None] * bias - 0.3 * x


def path_config(upstream_path: str, prediction: str) -> PathConfig:
    return PathConfig(path=PATH_NAMES[upstream_path], prediction=prediction)
