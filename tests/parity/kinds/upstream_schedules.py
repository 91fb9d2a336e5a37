"""Upstream's learning-rate schedule and EMA decay, with their faults, to compare with its recorded runs."""

from __future__ import annotations

from scldm.optim.ema import ema_decay
from scldm.optim.schedule import DecayType, decayed


def upstream_ema_decay(
    call: int, *, beta: float = 0.9999, update_every: int = 10, update_after_step: int = 10_000
) -> float | None:
    """Return the decay of upstream (ema_pytorch) on its call number `call` = 1, 2, …; None if it skips the call.

    It updates on calls 1, 1 + every, …, ours on every, 2 every, …; a decay of 0 is a copy.
    """
    if (call - 1) % update_every:
        return None
    return ema_decay(call, decay=beta, start=update_after_step)


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
