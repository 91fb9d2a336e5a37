"""A worker that runs out of memory says which settings take it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from pydantic import ValidationError

from pipeline.config.train import TrainConfig
from pipeline.data.loading.blocks import NoRoom

SIGNS = ("out of memory", "can't allocate memory", "cannot allocate memory", "cublas_status_alloc_failed")


class OutOfMemory(RuntimeError):
    """There was too little memory. The group may start again: another process may have held it."""


@contextmanager
def memory_is_explained(config: TrainConfig, micro: int, where: str) -> Iterator[None]:
    """An error for want of memory inside becomes one that names settings, said at once and raised.

    Args:
        micro: Cells that a worker takes at once.
        where: In which part of training; `in step 7`.

    Raises:
        OutOfMemory: from the error that torch, Python or TileDB gave.
        NoRoom: as it was; said too.
    """
    try:
        yield
    except OutOfMemory:
        raise
    except NoRoom as error:  # in Ray's object store; it has named the settings
        print(f"worker {dist.get_rank()}: {error}", flush=True)
        raise
    except (MemoryError, OSError, RuntimeError) as error:
        if not is_of_memory(error):
            raise
        on_gpu = isinstance(error, torch.OutOfMemoryError)
        said = advice(config, micro, f"worker {dist.get_rank()} ran out of memory {where}", str(error), on_gpu=on_gpu)
        print(said, flush=True)
        raise OutOfMemory(said) from error


def is_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory ran out. On a CPU torch has no kind of error for it."""
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return True
    return any(sign in str(error).lower() for sign in SIGNS)


def advice(config: TrainConfig, micro: int, what: str, error: str, *, on_gpu: bool) -> str:
    """What is wrong, and which settings mend it: those that change no number first, and only what is valid."""
    asked: list[dict[str, Any]] = []
    if micro > 1:
        asked.append({"feed.micro_batch_size": micro // 2})
    if on_gpu:  # they save the GPU's memory; the host's they take
        asked.append({"zero_stage": config.zero_stage + 1})
        if config.offload_optimizer == "none":
            asked.append({"offload_optimizer": "cpu"})
        if config.precision == "fp32":
            asked.append({"precision": "bf16"})
    if getattr(config, "genes_per_step", 0) is None:
        asked.append({"genes_per_step": 2000})
    settings = [f"train.{k}={v}" for one in asked for k, v in one.items() if _is_valid(config, k, v)]
    if not on_gpu:
        settings.append("fewer workers (resources.workers)")
    first = error.strip().splitlines()[0] if error.strip() else "MemoryError"
    return (
        f"{what}: {first[:200]}. A worker takes {micro} cells at once. Set {', or '.join(settings)}; `scldm plan` says "
        "what the model, its optimizer and a micro batch take"
    )


def _is_valid(config: TrainConfig, path: str, value: Any) -> bool:
    """Whether the section would still be read with this setting."""
    settings = config.model_dump()
    *above, key = path.split(".")
    section = settings
    for name in above:
        section = section[name]
    section[key] = value
    try:
        type(config).model_validate(settings)
    except ValidationError:
        return False
    return True
