"""What the tasks share: the order of the cells, and the facts of the stage."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import nn

from pipeline.config.job import FeedConfig
from pipeline.data.loading.blocks import BlockSource
from pipeline.data.loading.order import FeedOrder
from pipeline.training.loop import TrainingResult


def make_order(source: BlockSource, config: FeedConfig, seed: int) -> FeedOrder:
    """Build the order in which the cells of a source are trained on."""
    return FeedOrder(source.ids, source.tile, seed, config.batch_size, config.lanes, config.block_rows)


def training_facts(result: TrainingResult, weights: str, module: nn.Module) -> dict[str, Any]:
    """Wait for uploads and return the facts of a training stage.

    Args:
        weights: Which weights were exported, `train.export`.
        module: The network, for the number of its parameters.
    """
    result.close()
    facts = {
        "model": "model",
        "exported": {"weights": weights, "step": result.exported_step},
        "checkpoint": str(Path("checkpoints") / result.checkpoint.name),
        "steps": result.steps,
        "n_parameters": sum(p.numel() for p in module.parameters()),
        "metrics": result.metrics,
    }
    for callback in result.callbacks:
        facts |= callback.facts()
    return facts
