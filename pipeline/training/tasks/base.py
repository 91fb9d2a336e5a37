"""What the tasks share: the order of the cells, and the facts of the stage."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import torch.distributed as dist
from torch import Tensor, nn

from pipeline.config.job import FeedConfig
from pipeline.data.loading.blocks import BlockSource
from pipeline.data.loading.order import FeedOrder
from pipeline.training.loop import TrainingResult
from scldm.checkpoints.start_from import Started
from scldm.optim.lora import is_adapter

log = logging.getLogger(__name__)
Rates = dict[
    str, float | Tensor
]  # parameter -> learning rate relative to that of a step, one number or one for each row


def make_order(source: BlockSource, config: FeedConfig, seed: int) -> FeedOrder:
    """Build the order in which the cells of a source are trained on."""
    return FeedOrder(source.ids, source.tile, seed, config.batch_size, config.lanes, config.block_rows)


def report_start(model: Path, started: Started) -> dict[str, Any]:
    """Log what a network took over from a model, on one worker, and return it as a fact."""
    if dist.get_rank() == 0:
        for line in (f"the weights start from {model}", *started.lines()):
            log.info("%s", line)
    return {"model": str(model), **started.facts()}


def training_facts(result: TrainingResult, weights: str, module: nn.Module) -> dict[str, Any]:
    """Wait for uploads and return the facts of a training stage.

    Args:
        weights: Which weights were exported, `train.export`.
        module: The network, for the numbers of its parameters: of the exported model, and of those trained if these are
            fewer or, with adapters, others.
    """
    result.close()
    facts = {
        "model": "model",
        "exported": {"weights": weights, "step": result.exported_step},
        "checkpoint": str(Path("checkpoints") / result.checkpoint.name),
        "steps": result.steps,
        **parameter_facts(module),
        "metrics": result.metrics,
    }
    for callback in result.callbacks:
        facts |= callback.facts()
    return facts


def parameter_facts(module: nn.Module) -> dict[str, int]:
    """Return n_parameters, of the network without adapters, and n_trained if something is not trained."""
    named = dict(module.named_parameters())
    trained = [p for p in named.values() if p.requires_grad]
    n = sum(_size(p) for name, p in named.items() if not is_adapter(name))
    return {"n_parameters": n, **({"n_trained": sum(map(_size, trained))} if len(trained) < len(named) else {})}


def _size(parameter: nn.Parameter) -> int:
    """Return the number of elements, also if ZeRO stage 3 has left a part of them here."""
    return int(getattr(parameter, "ds_numel", parameter.numel()))
