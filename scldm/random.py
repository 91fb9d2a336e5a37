"""Generators from keys: what is random is a function of (seed, step, lane, cell, …) and of nothing else."""

from __future__ import annotations

import numpy as np
import torch


def generator(*key: int) -> torch.Generator:
    """A CPU generator that depends on all of the key's non-negative integers."""
    state = np.random.SeedSequence(list(key)).generate_state(1, np.uint64)[0]
    return torch.Generator().manual_seed(int(state >> np.uint64(1)))
