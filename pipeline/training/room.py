"""A worker that runs out of memory says which settings take it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist

from pipeline.train_config import TrainConfig

SIGNS = ("out of memory", "can't allocate memory", "cannot allocate memory", "CUBLAS_STATUS_ALLOC_FAILED")


class OutOfMemory(RuntimeError):
    """There was no memory for a step. The group may start again: another process may have held it."""


@contextmanager
def memory_is_explained(config: TrainConfig, step: int) -> Iterator[None]:
    """An error for want of memory inside becomes one that names settings, said at once and raised.

    Raises:
        OutOfMemory: from the error that torch or Python gave.
    """
    try:
        yield
    except (MemoryError, RuntimeError) as error:  # torch.OutOfMemoryError is one; on a CPU torch has none of its own
        if not is_of_memory(error):
            raise
        said = advice(config, step, dist.get_rank(), str(error))
        print(said, flush=True)
        raise OutOfMemory(said) from error


def is_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory ran out."""
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return True
    return any(sign.lower() in str(error).lower() for sign in SIGNS)


def advice(config: TrainConfig, step: int, rank: int, error: str) -> str:
    """What is wrong, and which settings mend it: those that change no number first."""
    micro = config.feed.micro_batch_size
    remedies = [f"train.feed.micro_batch_size={max(1, micro // 2)} (now {micro}; the global batch stays as it is)"]
    if config.zero_stage < 3:
        remedies.append(f"train.zero_stage={config.zero_stage + 1}")
    if config.zero_stage > 0 and config.offload_optimizer == "none":
        remedies.append("train.offload_optimizer=cpu")
    if config.precision == "fp32":
        remedies.append("train.precision=bf16")
    if getattr(config, "genes_per_step", 0) is None:
        remedies.append("train.genes_per_step=2000")
    first = error.strip().splitlines()[0] if error.strip() else "MemoryError"
    return (
        f"worker {rank} ran out of memory in step {step}: {first[:200]}. Set {', or '.join(remedies)}; `scldm plan` "
        "says what the model, its optimizer and a micro batch take"
    )
