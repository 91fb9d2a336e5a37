"""What every rank would otherwise import and compile at its start, once, in the process that ranks are forked from."""

from __future__ import annotations

import os

os.environ.setdefault("DS_ACCELERATOR", "cpu")
os.environ.setdefault("OMP_NUM_THREADS", "1")

import deepspeed.runtime.zero.stage3
import deepspeed.runtime.zero.stage_1_and_2  # noqa: F401
import torch

import pipeline.data.soma.store
import pipeline.training.worker  # noqa: F401

torch.optim.AdamW([torch.zeros(1, requires_grad=True)])  # brings in torch's compiler, which it only asks for its state
