"""The engine: a network under DeepSpeed. The only module that imports DeepSpeed.

The engine averages gradients over workers and over the micro batches of a step, clips them, and steps the optimizer.
ZeRO stages, precision and accumulation come from our typed config; the learning rate is set by the loop at every step.
"""

from __future__ import annotations

import contextlib
import logging
import math
import os
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from pipeline.config.deepspeed import deepspeed_options
from pipeline.config.job import TrainConfig
from pipeline.training.engine.partitions import Flat, base_optimizer, flats_of, weights_from_flats
from pipeline.training.engine.state_files import Shards, shard_tensors
from scldm.nn.decoder import Decoder
from scldm.nn.encoder import Encoder
from scldm.optim.rates import SlowedPart, piece_factor, slowed

# They use weights of their parts outside of the parts' own forward passes. ZeRO stage 3, which gathers a part's weights
# for its forward pass, learned of that too late in a training that resumes; it gathers these modules whole.
GATHERED_WHOLE = [Encoder, Decoder]


def _import_deepspeed() -> Any:
    """Import DeepSpeed without letting it compile C++ on a machine without accelerator.

    Its first `initialize` would build a shared-memory communicator for minutes, or fail without a compiler. The name is
    private to DeepSpeed; a test fails if it moves.
    """
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    with _nothing_compiled(), _no_autotuner():
        import deepspeed
        import deepspeed.runtime.zero.muon.original_muon

    deepspeed.utils.logger.setLevel(logging.ERROR)
    if not torch.cuda.is_available():
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    return deepspeed


@contextlib.contextmanager
def _nothing_compiled() -> Iterator[None]:
    """Disable `torch.compile` during the import.

    DeepSpeed's Muon compiles itself when it is imported. For an optimizer that is not used here, every worker would
    load torch's compiler at its start: seconds on a machine that has a dead worker to replace.
    """
    compile_ = torch.compile
    torch.compile = lambda function=None, **options: function if function is not None else lambda f: f
    try:
        yield
    finally:
        torch.compile = compile_


@contextlib.contextmanager
def _no_autotuner() -> Iterator[None]:
    """Replace DeepSpeed's autotuner during the import.

    It imports all of MLflow: seconds of every worker's start, for nothing that is used here. A later import of the
    autotuner gets the real one.
    """
    package, name = "deepspeed.autotuning", "deepspeed.autotuning.autotuner"
    if package in sys.modules:
        yield
        return
    stub = ModuleType(name)
    stub.Autotuner = None  # type: ignore[attr-defined]
    sys.modules[name] = stub
    try:
        yield
    finally:
        del sys.modules[name]
        sys.modules.pop(package, None)  # it holds the stub


class Engine:
    """A network under DeepSpeed.

    Args:
        module: The network; its forward pass returns the loss of each cell.
        optimizer: A torch optimizer over the module's parameters.
        config: The training run.
        micro_batch_size: This worker's micro batch size, in cells.
        accumulation: Micro batches in a step.
        rates: Learning rates relative to that of a step, by parameter: one number, or one for each row. 1 for others.
    """

    def __init__(
        self,
        module: nn.Module,
        optimizer: torch.optim.Optimizer,
        config: TrainConfig,
        *,
        micro_batch_size: int,
        accumulation: int,
        rates: Mapping[str, float | Tensor] | None = None,
    ):
        self._deepspeed = _import_deepspeed()
        self.stage = config.zero_stage
        self._open, self._stepped = True, False
        self._slowed: dict[int, list[SlowedPart]] | None = None  # by flat; known when DeepSpeed has made them
        self._norm: float | None = None  # only under stage 0, where DeepSpeed computes it and does not keep it
        settings = deepspeed_options(
            config, n_parameters=sum(p.numel() for p in module.parameters() if p.requires_grad),
            micro_batch_size=micro_batch_size, accumulation=accumulation, gpu=torch.cuda.is_available(),
        )  # fmt: skip
        self._rates = dict(rates or {})
        if self.stage == 3:
            self._deepspeed.utils.set_z3_leaf_modules(module, GATHERED_WHOLE, raise_if_not_found=False)
        self._gate(optimizer)
        self._engine: Any = None
        self._engine, self.optimizer, _, _ = self._deepspeed.initialize(
            model=module,
            model_parameters=[p for p in module.parameters() if p.requires_grad],
            optimizer=optimizer,
            config=settings,
            dist_init_required=False,
        )
        self._clip = config.optimizer.clip
        self._engine.clip_fp32_gradients = self._clip_fp32

    @property
    def module(self) -> nn.Module:
        """The network."""
        return self._engine.module

    @property
    def device(self) -> torch.device:
        """The device of the network."""
        return self._engine.device

    def __call__(self, *args: Any, **kwargs: Any) -> Tensor:
        return self._engine(*args, **kwargs)

    def backward(self, loss: Tensor) -> None:
        """Add the gradients of a micro batch."""
        self._engine.backward(loss)

    def step(self, lr: float, *, apply: bool = True) -> None:
        """Count a micro batch; after the last one of a step, clip and clear the gradients and update the weights.

        Args:
            apply: False skips the update: weights and optimizer state stay, gradients are dropped. It must be the same
                on every worker. A gradient that is not finite is never applied.
        """
        self._open, self._stepped = apply, False
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self._engine.step()

    @property
    def applied(self) -> bool:
        """Whether the last step changed the weights; the same on every worker."""
        return self._stepped

    @property
    def grad_norm(self) -> float | None:
        """Global gradient norm of the last step, before clipping; None before the first step."""
        norm = self._norm if self._norm is not None else self._engine.get_global_grad_norm()
        return None if norm is None else float(norm)

    def _gate(self, optimizer: torch.optim.Optimizer) -> None:
        """Let the optimizer step only if the update is to be applied and the gradient is finite.

        The gate is on the optimizer, below DeepSpeed, because every ZeRO stage calls it, with its gradients reduced and
        their norm known, and clears them afterwards as after any step.
        """
        step = optimizer.step

        def gated(*args: Any, **kwargs: Any) -> Any:
            if self._engine is None or not self._open or not self._finite():
                return None
            self._stepped = True
            with slowed(self._slowed_parts(optimizer)):
                return step(*args, **kwargs)

        optimizer.step = gated

    def _slowed_parts(self, optimizer: torch.optim.Optimizer) -> list[SlowedPart]:
        """Return the parts with a lower learning rate of what the optimizer updates now: under stage 3 one flat."""
        if not self._rates:
            return []
        if self._slowed is None:
            flats = flats_of(self.optimizer, self.module, rank=dist.get_rank())
            self._slowed = {id(flat.tensor): list(self._parts_of(flat)) for flat in flats}
        updated = (p for group in optimizer.param_groups for p in group["params"])
        return [part for p in updated for part in self._slowed.get(id(p), ())]

    def _parts_of(self, flat: Flat) -> Iterator[SlowedPart]:
        parameters = dict(self.module.named_parameters())
        values = flat.tensor.detach().view(-1)
        for piece in flat.pieces:
            if (factor := self._rates.get(piece.name)) is not None:
                p = parameters[piece.name]
                shape = getattr(p, "ds_shape", p.shape)
                row = math.prod(shape[1:])
                own = piece_factor(factor, row_size=row, start=piece.start, numel=piece.numel)
                own = own.to(values) if isinstance(own, Tensor) else own
                yield SlowedPart(values[piece.at : piece.at + piece.numel], own)

    def _finite(self) -> bool:
        norm = self._norm if self._norm is not None else getattr(self._engine.optimizer, "_global_grad_norm", None)
        # DeepSpeed reports -1 for a norm that is not finite.
        return norm is None or (math.isfinite(float(norm)) and float(norm) >= 0)

    def _clip_fp32(self) -> None:
        """Clip like DeepSpeed, but keep the norm."""
        self._norm = float(nn.utils.clip_grad_norm_(self.module.parameters(), self._clip))

    @contextlib.contextmanager
    def whole_parameters(self) -> Iterator[None]:
        """Gather all parameters on every worker for the block; under ZeRO stage 3 each holds a part. Collective."""
        if self.stage < 3:
            yield
            return
        with self._deepspeed.zero.GatheredParameters(list(self.module.parameters())):
            yield

    def state(self) -> dict[str, Tensor]:
        """Return what this worker writes into a checkpoint, by name; see `state_files`. Collective."""
        rank, world_size = dist.get_rank(), dist.get_world_size()
        flats = flats_of(self.optimizer, self.module, rank=rank)
        with self._whole_untrained():
            whole = {name: t.detach().clone() for name, t in self._untrained().items()}
        return shard_tensors(flats, base_optimizer(self.optimizer), whole, rank=rank, world_size=world_size)

    def load(self, folder: Path, *, step: int) -> None:
        """Load weights and optimizer state from a checkpoint, written by any number of workers. Collective."""
        shards = Shards(folder)
        for flat in flats_of(self.optimizer, self.module, rank=dist.get_rank()):
            flat.fill(base_optimizer(self.optimizer), shards.fields)
        weights_from_flats(self.optimizer)
        with self._whole_untrained(), torch.no_grad():
            for name, tensor in self._untrained().items():
                tensor.copy_(shards.whole(name))
        self._engine.global_steps = step

    def _untrained(self) -> dict[str, Tensor]:
        """Return buffers, and parameters without gradient, by name."""
        frozen = {name: p for name, p in self.module.named_parameters() if not p.requires_grad}
        return {**frozen, **dict(self.module.named_buffers())}

    @contextlib.contextmanager
    def _whole_untrained(self) -> Iterator[None]:
        """Gather frozen parameters, which ZeRO stage 3 partitions too; worker 0's changes are sent to all."""
        frozen = [p for p in self.module.parameters() if not p.requires_grad]
        if self.stage < 3 or not frozen:
            yield
            return
        with self._deepspeed.zero.GatheredParameters(frozen, modifier_rank=0):
            yield

    def export_state(self, checkpoint: Path) -> dict[str, Tensor]:
        """Return the weights in fp32 by name, on the CPU: from the module if it holds all, or from a checkpoint."""
        names = self.module.state_dict(keep_vars=True)
        if self.stage < 3:
            return {k: v.detach().float().cpu() for k, v in names.items()}
        shards, first = Shards(checkpoint), {id(p): name for name, p in self._trained_first()}
        return {
            name: shards.weight(first[id(p)], getattr(p, "ds_shape", p.shape)) if id(p) in first
            else shards.whole(name).float()
            for name, p in names.items()
        }  # fmt: skip

    def _trained_first(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Yield trained parameters by their first name, if several modules share one."""
        return ((name, p) for name, p in self.module.named_parameters() if p.requires_grad)
