"""DeepSpeed's configuration, made from our typed settings and an optional file of further options.

Every option has one owner. Batch size, accumulation, clipping, ZeRO stage, precision, learning rate and optimizer
follow from the job, and DeepSpeed never scales or schedules them. A file that sets one of them is refused.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from pipeline.config.train import TrainConfig
from scldm.errors import InputError

DEFAULT_BUCKET = 500_000_000  # DeepSpeed's own
_ACCUMULATION = "train.feed.batch_size and micro_batch_size"
# DeepSpeed's key -> the setting of ours that it is made from. A prefix owns what is below it.
OWNED = {
    "train_batch_size": "train.feed.batch_size",
    "train_micro_batch_size_per_gpu": "train.feed.micro_batch_size",
    "gradient_accumulation_steps": _ACCUMULATION,
    "gradient_clipping": "train.optimizer.clip",
    "zero_optimization.stage": "train.zero_stage",
    "zero_optimization.offload_optimizer": "train.offload_optimizer",
    "zero_optimization.cpu_offload": "train.offload_optimizer",
    "zero_force_ds_cpu_optimizer": "train.offload_optimizer",
    "zero_allow_untested_optimizer": "train.optimizer",
    "bf16": "train.precision",
    "bfloat16": "train.precision",
    "fp16": "train.precision",
    "amp": "train.precision",
    "torch_autocast": "train.precision",
    "optimizer": "train.optimizer",
    "scheduler": "train.optimizer",
    "steps_per_print": "train.log_every_seconds",
    "checkpoint": "train.checkpoint_every",
}


def deepspeed_options(
    config: TrainConfig, *, n_parameters: int, micro_batch_size: int, accumulation: int, gpu: bool
) -> dict[str, Any]:
    """Return the dictionary for `deepspeed.initialize`.

    Args:
        n_parameters: Number of trained parameters.
        micro_batch_size: Cells in a worker's micro batch.
        accumulation: Micro batches per step.
        gpu: Whether workers have a GPU.
    """
    zero: dict[str, Any] = {"stage": config.zero_stage}
    if config.offload_optimizer == "cpu":
        zero["offload_optimizer"] = {"device": "cpu", "pin_memory": gpu}
    ours = {
        "train_micro_batch_size_per_gpu": micro_batch_size,
        "gradient_accumulation_steps": accumulation,
        "gradient_clipping": config.optimizer.clip,
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,
        # The optimizer is torch's, on the device of its shard; DeepSpeed would compile its own.
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": 2**40,
        "bf16": {"enabled": config.precision == "bf16"},
    }
    raw = {} if config.deepspeed is None else read_options(config.deepspeed)
    bucket = {"reduce_bucket_size": gradient_bucket(n_parameters)}
    return {
        **_gradient_types(config),
        **raw,
        **ours,
        "zero_optimization": {**bucket, **raw.get("zero_optimization", {}), **zero},
    }


def _gradient_types(config: TrainConfig) -> dict[str, Any]:
    """Return the precision in which gradients are summed over micro batches and workers; DeepSpeed's own is bf16's.

    A sum of many gradients in bf16 loses what is below 1/256 of it. Stage 0 of DeepSpeed cannot accumulate in another
    precision than the network's.
    """
    if config.precision != "bf16":
        return {}
    accumulated = {} if config.zero_stage == 0 else {"data_types": {"grad_accum_dtype": "fp32"}}
    return {"communication_data_type": "fp32", **accumulated}


def gradient_bucket(n_parameters: int) -> int:
    """Return the size of the buffer that gradients are reduced in: DeepSpeed's 500 million numbers, or the model's.

    DeepSpeed allocates the whole buffer even for a small model: 2 GB in fp32. One bucket that holds all gradients gives
    the same reduction.
    """
    return max(1, min(DEFAULT_BUCKET, n_parameters))


def read_options(path: str) -> dict[str, Any]:
    """Read a file of further DeepSpeed options.

    Raises:
        InputError: The file cannot be read, or sets options that other settings own; all are named.
    """
    try:
        raw = json.loads(Path(path).expanduser().read_text())
    except OSError as error:
        raise InputError(
            f"train.deepspeed: {path} cannot be read ({error.strerror}); a JSON file of DeepSpeed options that every "
            "worker sees, or null"
        ) from error
    except ValueError as error:
        raise InputError(f"train.deepspeed: {path} is not JSON ({error})") from error
    if not isinstance(raw, dict) or not isinstance(raw.get("zero_optimization", {}), dict):
        raise InputError(f"train.deepspeed: {path} must hold a JSON object, and so must its zero_optimization")
    if problems := list(_not_theirs(raw, path)):
        raise InputError("\n".join(problems))
    return raw


def _not_theirs(raw: Mapping[str, Any], path: str) -> Iterator[str]:
    for key in (*raw, *(f"zero_optimization.{k}" for k in raw.get("zero_optimization", {}))):
        if key in OWNED:
            yield f"train.deepspeed: {path} sets {key}, which {OWNED[key]} decides; take it out of the file"
