"""Predict real cells under another condition: what would this cell be if it had another label?

From latents, the flow is integrated backwards to the noise that the cell comes from, and forwards under the new labels,
so that the cell keeps what its labels do not explain. From control cells, a flow that was trained so carries them
forwards. From noise, a new cell is made with its labels and library size.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd

from pipeline.config.apply import PerturbConfig
from pipeline.config.context import StageContext
from pipeline.data.loading.blocks import LABEL
from pipeline.inference.applier import NAME, OutputLayout, Values
from pipeline.inference.apply_job import Pool, run_batches
from pipeline.inference.models import (
    check_target,
    draws_counts,
    flow_start,
    latent_width,
    locate_models,
    target_classes,
)
from pipeline.inference.rows import SourceRows
from pipeline.stages.unseen.beside import Beside
from pipeline.stages.unseen.perturber import Perturber
from pipeline.stages.unseen.pooled import run_pooled
from pipeline.stages.unseen.shift import run_shift
from scldm.data.vocabulary import Vocabulary
from scldm.errors import InputError

if TYPE_CHECKING:
    from scldm.flow.config import ControlStart


def run(config: PerturbConfig, context: StageContext, pool: Pool | None = None) -> dict[str, Any]:
    """Run the stage; returns the facts of `run_batches`."""
    from scldm.checkpoints.asked_values import value_notes  # imports torch

    if config.method == "shift":
        return run_shift(config, context, pool)
    models = locate_models(config, context)
    vocabulary = Vocabulary.load(Path(models.vae) / "vocabulary.json")
    start = flow_start(str(models.flow))

    def prepare(rows: SourceRows) -> None:
        if config.start == "control" and start is not None:
            _require_controls(rows.table, vocabulary, start)

    if config.method == "pooled":
        return run_pooled(config, context, pool, check=prepare)
    check_target(config, vocabulary, str(models.flow), draws_counts=draws_counts(models.vae))
    values: Values = "counts" if draws_counts(models.vae) else "log1p_cp10k"
    layout = OutputLayout(genes=True, values=values, obsm={"X_scldm": latent_width(models.vae)},
                          obs={f"to_{label}": object for label in config.to})  # fmt: skip
    facts = run_batches(
        config, context, stage="perturb", processor=Perturber, layout=layout, pool=pool, prepare=prepare,
        columns=Beside(config, context, vocabulary),
    )  # fmt: skip
    notes = value_notes(vocabulary, [target_classes(config, vocabulary)])
    return facts | {"notes": [*facts["notes"], *notes]}


def _require_controls(rows: pd.DataFrame, vocabulary: Vocabulary, start: ControlStart) -> None:
    from scldm.generation.perturbed import not_controls

    classes = vocabulary.label(start.label).decode(rows[LABEL + start.label].tolist())
    if problem := not_controls(classes, rows[NAME].tolist(), start):
        raise InputError(
            f"{problem}. Select the control cells with cells.where={{{start.label}: {start.control}}}, or set "
            "start=latents"
        )
