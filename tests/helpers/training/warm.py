"""Imports once, in the process that ranks are forked from, what every rank would otherwise import at its start."""

from __future__ import annotations

import os

os.environ.setdefault("DS_ACCELERATOR", "cpu")
os.environ.setdefault("OMP_NUM_THREADS", "1")

import deepspeed.runtime.zero.stage3
import deepspeed.runtime.zero.stage_1_and_2  # noqa: F401
import torch

import pipeline.data.soma.store
import pipeline.training.worker  # noqa: F401

torch.optim.AdamW([torch.zeros(1, requires_grad=True)])  # imports torch's compiler
