"""Generators from keys: what is random is a function of (seed, step, stream, cell, …) and of nothing else."""

from __future__ import annotations

import numpy as np
import torch


def generator(*key: int) -> torch.Generator:
    """Return a CPU generator that depends on every integer of the key (non-negative)."""
    state = np.random.SeedSequence(list(key)).generate_state(1, np.uint64)[0]
    return torch.Generator().manual_seed(int(state >> np.uint64(1)))
