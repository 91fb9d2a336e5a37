"""Turns an out-of-memory error of a worker into one that names the settings that reduce its memory."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from pydantic import ValidationError

from pipeline.config.train import TrainConfig
from pipeline.data.loading.blocks import NoRoom

SIGNS = ("out of memory", "can't allocate memory", "cannot allocate memory", "cublas_status_alloc_failed")
log = logging.getLogger(__name__)


class OutOfMemory(RuntimeError):
    """A worker ran out of memory. A restart may succeed: another process may have held the memory."""


@contextmanager
def explain_out_of_memory(config: TrainConfig, micro: int, where: str) -> Iterator[None]:
    """Log an out-of-memory error of the block and raise it with advice.

    Args:
        micro: A worker's micro batch size, in cells.
        where: The part of training, for example `in step 7`.

    Raises:
        OutOfMemory: from the error that torch, Python or TileDB raised.
        NoRoom: unchanged, but logged too.
    """
    try:
        yield
    except OutOfMemory:
        raise
    except NoRoom as error:  # in Ray's object store; it names the settings already
        log.error(f"worker {dist.get_rank()}: {error}")
        raise
    except (MemoryError, OSError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        on_gpu = isinstance(error, torch.OutOfMemoryError)
        what = f"worker {dist.get_rank()} ran out of memory {where}"
        message = advice(config, micro, what, str(error), on_gpu=on_gpu)
        log.error(message)
        raise OutOfMemory(message) from error


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether an error means that memory ran out. On a CPU torch has no type of its own for it."""
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return True
    return any(sign in str(error).lower() for sign in SIGNS)


def advice(config: TrainConfig, micro: int, what: str, error: str, *, on_gpu: bool) -> str:
    """Return a message with the settings that reduce memory, only valid ones, and first those that change no number.

    Args:
        micro: A worker's micro batch size, in cells.
        what: Who ran out of memory where; the message begins with it.
        error: The original error's text.
        on_gpu: Whether the memory of the GPU ran out, and not the host's.
    """
    candidates: list[tuple[str, Any]] = []
    if micro > 1:
        candidates.append(("feed.micro_batch_size", micro // 2))
    if on_gpu:  # these save the GPU's memory and use more of the host's
        candidates.append(("zero_stage", config.zero_stage + 1))
        if config.offload_optimizer == "none":
            candidates.append(("offload_optimizer", "cpu"))
        if config.precision == "fp32":
            candidates.append(("precision", "bf16"))
    if getattr(config, "genes_per_step", 0) is None:
        candidates.append(("genes_per_step", 2000))
    settings = [f"train.{path}={value}" for path, value in candidates if _is_valid(config, path, value)]
    if not on_gpu:
        settings.append("fewer workers (resources.workers)")
    first = error.strip().splitlines()[0] if error.strip() else "MemoryError"
    return (
        f"{what}: {first[:200]}. A worker computes {micro} cells at a time. Set {', or '.join(settings)}; `scldm plan` "
        "estimates the memory of the model, its optimizer and a micro batch"
    )


def _is_valid(config: TrainConfig, path: str, value: Any) -> bool:
    """Return whether the section would still validate with this setting."""
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
