"""Predict how wrong the cells of a combination will be that no training cell has, with an interval.

Measured combinations are left out in groups; short trainings of a flow, on the latents of the pipeline's VAE, predict
them, and so do the answers that are free. What tells their errors (`scldm.metrics.perturbation.nearness`) is known of
unmeasured combinations too. Everything runs in this process.
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch

from pipeline.config.context import StageContext
from pipeline.config.job import PredictErrorConfig
from pipeline.core.files import replaces
from pipeline.core.progress import ProgressReader, ProgressWriter
from pipeline.inference.actors.numerics import MARK, agree, begin
from pipeline.report.predicted_errors import write_predicted_errors
from pipeline.stages.unseen.asked import check_predictable, combinations_asked, require_askable
from pipeline.stages.unseen.left_out import Group, LeaveOut
from pipeline.stages.unseen.outcome import LEFT_OUT, PREDICTIONS, Outcome, outcome
from pipeline.stages.unseen.screen import read_latents, read_screen
from scldm.checkpoints.native import load_vae
from scldm.metrics.perturbation.leave_out import askable, folds
from scldm.nn.kernels.precision import set_precision

PAGE = "predicted_errors.html"
logger = logging.getLogger(__name__)


def run(config: PredictErrorConfig, context: StageContext) -> dict[str, Any]:
    """Run the stage.

    Returns:
        Facts: predicted and left_out (tables), report (page), n_left_out, n_predicted, coverage_90, verdict_right,
        verdict_always, verdict_by, calibrated, labels, control, method, start (of method: flow), data (digest of the
        cells), precision, device (kind).
    """
    ingest, model = context.inputs["ingest"], context.inputs["train_vae"].path("model")
    _, unseen = check_predictable(config, ingest, model)
    cells = read_screen(ingest, config.control, max_cells=config.max_cells, seed=context.seed)
    pairs = askable(cells.screen)  # max_cells may leave fewer of them
    require_askable(pairs, cells.screen.control)
    asked = [pair for pair in combinations_asked(config, cells.measured) if pair in unseen]
    rng = np.random.default_rng(context.seed)
    groups = [Group(f"group{i}", tuple(g), True) for i, g in enumerate(folds(pairs, config.folds, rng))]
    groups += [Group("unmeasured", tuple(asked), False)] if asked else []
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    folder = context.folder / "results"
    folder.mkdir(exist_ok=True)
    logger.info("predict_error: %d combinations are left out in %d groups; %d were not measured", len(pairs),
                len(groups) - bool(asked), len(asked))  # fmt: skip
    if not (context.folder / MARK).is_file():  # results of versions that knew no precision say nothing of it
        begin(context.folder, [{} for _ in folder.glob("*.npz")], gpus=context.resources.gpus_per_worker)
    numerics = agree(context.folder, config.precision, device, where="precision")
    vae = load_vae(model, device=device)
    set_precision(vae.vae, numerics.precision)
    leave_out = LeaveOut(
        config, vae, cells, read_latents(context.inputs["encode"], cells.joinids), folder,
        seed=context.seed, progress=ProgressWriter(context.folder), device=device, precision=numerics.precision,
    )  # fmt: skip
    with ProgressReader(context.folder, "predict_error"):
        results = leave_out.run(groups)
    found = outcome(cells, groups, results, config.judged)
    _write(context.folder, found)
    for note in found.notes:
        logger.info("predict_error: %s", note)
    context.tracker.metrics(_metrics(found), step=0)
    facts = {"predicted": PREDICTIONS, "left_out": LEFT_OUT, "report": PAGE, **found.facts, "notes": found.notes}
    facts |= numerics.as_plain()
    return facts | {
        "labels": [x.name for x in cells.vocabulary.labels], "control": dict(config.control),
        "data": str(ingest.facts.get("digest", "")),
    } | ({"start": config.start or "noise"} if config.judged == "flow" else {})  # fmt: skip


def _metrics(found: Outcome) -> dict[str, float]:
    """Return what is logged: coverage of the intervals, and the share of left-out combinations that are better."""
    values = {f"believe/coverage_90_{measure}": v for measure, v in found.facts["coverage_90"].items()}
    return values | {f"believe/{k}": v for k, v in found.facts.items() if k.startswith("better_than_")}


def _write(folder: Path, found: Outcome) -> None:
    for name, table in ((PREDICTIONS, found.predicted), (LEFT_OUT, found.left_out)):
        with replaces(folder / name) as tmp:
            table.to_csv(tmp, index=False)
    write_predicted_errors(folder / PAGE, found.predicted, found.left_out, found.facts, found.notes)


def read_predictions(path: Path) -> pd.DataFrame:
    """Read the table of predicted errors; classes stay text."""
    table = pd.read_csv(path, dtype=str, keep_default_na=False)
    numbers = [c for c in table if c.endswith(("_low", "_high")) or c.removeprefix("free_") in
               ("delta_pearson", "energy_over_floor")]  # fmt: skip
    return table.assign(**{c: pd.to_numeric(table[c]) for c in numbers})
