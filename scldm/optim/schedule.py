"""Learning-rate schedule: linear warm-up, hold, decay. A factor of the peak rate, a pure function of the step.

Step s is the number of optimizer steps already taken, so that the first step uses the factor at 0.
"""

from __future__ import annotations

import math
from typing import Literal

from scldm.optim.config import OptimizerConfig

DecayType = Literal["cosine", "sqrt"]


def learning_rate_factor(step: int, max_steps: int, config: OptimizerConfig) -> float:
    """Return the learning rate at a step, relative to the peak.

    The factor is continuous, 1 between warm-up and decay. The decay takes the last `decay` of the run, or what the
    warm-up leaves of it. At or past max_steps the factor is final_factor (1 without a decay).

    Args:
        step: Optimizer steps taken so far.
        max_steps: Optimizer steps of the whole run.
        config: Fractions and shape of the schedule.
    """
    if step < 0 or max_steps < 1:
        raise ValueError(f"step ({step}) must be at least 0 and max_steps ({max_steps}) at least 1")
    warmup = config.warmup * max_steps
    if step < warmup:
        return (step + 1) / (warmup + 1)  # never 0: a step at learning rate 0 is a wasted batch
    start = max(warmup, (1 - config.decay) * max_steps)
    if config.decay == 0 or step <= start:
        return 1.0
    return decayed((step - start) / (max_steps - start), config.decay_type, final_factor=config.final_factor)


def decayed(progress: float, decay_type: DecayType, *, final_factor: float) -> float:
    """Return the decay factor: 1 at progress 0, final_factor at progress 1 and beyond."""
    progress = min(progress, 1.0)
    shape = (1 + math.cos(math.pi * progress)) / 2 if decay_type == "cosine" else 1 - math.sqrt(progress)
    return final_factor + (1 - final_factor) * shape
