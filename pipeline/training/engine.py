"""DeepSpeed, and nothing else of the training: the one module that imports it.

The engine averages gradients over workers and over the micro batches of a step, clips them, and steps the optimizer.
ZeRO stages, precision and accumulation come from our typed config; the learning rate is ours and set at every step.
"""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from pipeline.job import TrainConfig

TAG = "state"


def _import_deepspeed() -> Any:
    """DeepSpeed, told not to compile C++ on a machine without accelerator.

    At its first initialize it would build a shared-memory communicator for minutes, or fail without a compiler. The
    name is private to DeepSpeed; a test says so when it moves.
    """
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    import deepspeed

    deepspeed.utils.logger.setLevel(logging.ERROR)
    if not torch.cuda.is_available():
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    return deepspeed


class Engine:
    """A module under DeepSpeed.

    Args:
        module: The network; its forward pass returns the loss of each cell.
        optimizer: A torch optimizer over the module's parameters.
        config: The training run.
        micro_batch_size: Cells that this worker takes at once.
        accumulation: Micro batches in a step.
    """

    def __init__(
        self,
        module: nn.Module,
        optimizer: torch.optim.Optimizer,
        config: TrainConfig,
        *,
        micro_batch_size: int,
        accumulation: int,
    ):
        self._deepspeed = _import_deepspeed()
        self.stage = config.zero_stage
        self._fp32 = config.precision == "fp32"
        settings = {
            "train_micro_batch_size_per_gpu": micro_batch_size,
            "gradient_accumulation_steps": accumulation,
            "gradient_clipping": config.optimizer.clip,
            "zero_optimization": {"stage": config.zero_stage},
            "zero_allow_untested_optimizer": True,
            "steps_per_print": 2**40,
            "bf16": {"enabled": config.precision == "bf16"},
        }
        self._engine, self.optimizer, _, _ = self._deepspeed.initialize(
            model=module,
            model_parameters=[p for p in module.parameters() if p.requires_grad],
            optimizer=optimizer,
            config=settings,
            dist_init_required=False,
        )

    @property
    def module(self) -> nn.Module:
        return self._engine.module

    @property
    def device(self) -> torch.device:
        return self._engine.device

    def __call__(self, *args: Any, **kwargs: Any) -> Tensor:
        return self._engine(*args, **kwargs)

    def backward(self, loss: Tensor) -> None:
        self._engine.backward(loss)

    def step(self, lr: float) -> None:
        """Count a micro batch; at the last one of a step, clip, update and clear the gradients."""
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self._engine.step()

    @property
    def grad_norm(self) -> float | None:
        """Of the last step, before clipping; None where DeepSpeed does not compute it (stage 0 in fp32)."""
        norm = self._engine.get_global_grad_norm()
        return None if norm is None else float(norm)

    @contextlib.contextmanager
    def whole_parameters(self) -> Iterator[None]:
        """Parameters in full on every worker; ZeRO stage 3 keeps a part of each otherwise."""
        if self.stage < 3:
            yield
            return
        with self._deepspeed.zero.GatheredParameters(list(self.module.parameters())):
            yield

    def save(self, folder: Path, position: dict[str, Any]) -> None:
        """Every worker writes its part under `folder`. Collective; no file is written elsewhere."""
        self._engine.save_checkpoint(str(folder), tag=TAG, client_state={"position": position}, save_latest=False)

    def load(self, folder: Path) -> None:
        """Model, optimizer and counters from a folder that `save` wrote with as many workers. Collective."""
        path, _ = self._engine.load_checkpoint(str(folder), tag=TAG)
        if path is None:
            raise RuntimeError(f"DeepSpeed found nothing to load in {folder}")

    def export_state(self, checkpoint: Path) -> dict[str, Tensor]:
        """Weights in fp32 by name, on the CPU: from the module where it holds them whole, else from a checkpoint."""
        if self.stage < 3 and self._fp32:
            return {k: v.detach().float().cpu() for k, v in self.module.state_dict().items()}
        from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

        return get_fp32_state_dict_from_zero_checkpoint(str(checkpoint), tag=TAG)
