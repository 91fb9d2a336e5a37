"""The small field that upstream's recorded transports use, and their paths."""

from __future__ import annotations

from collections.abc import Callable

import torch
from parity.kinds.transport import PATH_NAMES
from torch import Tensor

from helpers.models.upstream_fixtures import Fixture
from scldm.flow.config import PathConfig


def toy_field(fixture: Fixture) -> Callable[[Tensor, Tensor], Tensor]:
    weight, bias = fixture["in/W"], fixture["in/b"]
    return lambda x, t: torch.tanh(x @ weight) + t[:, None, None] * bias - 0.3 * x


def path_config(upstream_path: str, prediction: str) -> PathConfig:
    return PathConfig(path=PATH_NAMES[upstream_path], prediction=prediction)
