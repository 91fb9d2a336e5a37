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


def upstream_wsd(
    step: int,
    *,
    num_training_steps: int,
    final_lr_factor: float = 0.1,
    num_warmup_steps: int = 1000,
    init_div_factor: float = 100,
    fract_decay: float = 0.1,
    decay_type: DecayType = "cosine",
) -> float:
    """Return the factor of upstream's schedule, including its jumps: to compare with its runs, not to train with.

    Its cosine is measured from the end of the warm-up but applied only in the last fract_decay of the run (a drop from
    1 to 0.13 in one step by default). Its sqrt is measured from the start of the decay, even inside the warm-up.
    """
    n_decay = int(fract_decay * num_training_steps)
    start = num_training_steps - n_decay
    if step < num_warmup_steps:
        progress = step / num_warmup_steps
        return progress + (1 - progress) / init_div_factor
    if step < start:
        return 1.0
    if step >= num_training_steps:
        return final_lr_factor
    if decay_type == "cosine":
        progress = (step - num_warmup_steps) / (num_training_steps - num_warmup_steps)
    else:
        progress = (step - start) / n_decay
    return decayed(progress, decay_type, final_factor=final_lr_factor)
