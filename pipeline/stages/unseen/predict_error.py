"""Predict how wrong the cells of a combination will be that no training cell has, with an interval.

Measured combinations are left out in groups; short trainings of a flow, on the latents of the pipeline's VAE, predict
them, and so do the answers that are free. What tells their errors (`scldm.metrics.perturbation.nearness`) is known of
unmeasured combinations too. Everything runs in this process.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch

from pipeline.config.context import StageContext
from pipeline.config.job import PredictErrorConfig
from pipeline.core.files import replaces
from pipeline.core.progress import ProgressReader, ProgressWriter
from pipeline.inference.models import draws_counts
from pipeline.report.predicted_errors import write_predicted_errors
from pipeline.stages.unseen.left_out import Group, LeaveOut
from pipeline.stages.unseen.outcome import LEFT_OUT, PREDICTIONS, Outcome, outcome
from pipeline.stages.unseen.screen import TrainingScreen, read_latents, read_screen, require_askable
from scldm.checkpoints.native import load_vae
from scldm.data.class_names import class_name
from scldm.data.user_table import read_table
from scldm.data.vocabulary import UnknownNameError
from scldm.errors import InputError
from scldm.metrics.perturbation.leave_out import askable, folds, unmeasured
from scldm.metrics.perturbation.screen import MIN_CELLS, Combination

PAGE = "predicted_errors.html"
SHOWN = 10  # problems in one message
logger = logging.getLogger(__name__)


def run(config: PredictErrorConfig, context: StageContext) -> dict[str, Any]:
    """Run the stage.

    Returns:
        Facts: predicted and left_out (tables), report (page), n_left_out, n_predicted, coverage_90, verdict_right,
        calibrated, labels, control, start, data (digest of the cells).
    """
    ingest, model = context.inputs["ingest"], context.inputs["train_vae"].path("model")
    if not draws_counts(model):
        raise InputError(
            f"{model} has a gaussian head, and predicted cells are compared with counts; predict_error needs a "
            "VAE with head nb_shared or nb_cell"
        )
    cells = read_screen(ingest, config.control, max_cells=config.max_cells, seed=context.seed)
    pairs = askable(cells.screen)
    require_askable(pairs, cells.screen.control)
    asked = _asked(config, cells)
    rng = np.random.default_rng(context.seed)
    groups = [Group(f"group{i}", tuple(g), True) for i, g in enumerate(folds(pairs, config.folds, rng))]
    groups += [Group("unmeasured", tuple(asked), False)] if asked else []
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    folder = context.folder / "results"
    folder.mkdir(exist_ok=True)
    logger.info("predict_error: %d combinations are left out in %d groups; %d were not measured", len(pairs),
                len(groups) - bool(asked), len(asked))  # fmt: skip
    leave_out = LeaveOut(
        config, load_vae(model, device=device), cells, read_latents(context.inputs["encode"], cells.joinids), folder,
        seed=context.seed, progress=ProgressWriter(context.folder), device=device,
    )  # fmt: skip
    with ProgressReader(context.folder, "predict_error"):
        results = leave_out.run(groups)
    found = outcome(cells, groups, results)
    _write(context.folder, found)
    for note in found.notes:
        logger.info("predict_error: %s", note)
    context.tracker.metrics(_metrics(found), step=0)
    facts = {"predicted": PREDICTIONS, "left_out": LEFT_OUT, "report": PAGE, **found.facts, "notes": found.notes}
    return facts | {
        "labels": [x.name for x in cells.vocabulary.labels], "control": dict(config.control), "start": config.start,
        "data": str(ingest.facts.get("digest", "")),
    }  # fmt: skip


def _metrics(found: Outcome) -> dict[str, float]:
    """Return what is logged: coverage of the intervals, and the share of left-out combinations that we win."""
    values = {f"believe/coverage_90_{measure}": v for measure, v in found.facts["coverage_90"].items()}
    return values | {"believe/better_than_shift": found.facts["better_than_shift"]}


def _write(folder: Path, found: Outcome) -> None:
    for name, table in ((PREDICTIONS, found.predicted), (LEFT_OUT, found.left_out)):
        with replaces(folder / name) as tmp:
            table.to_csv(tmp, index=False)
    write_predicted_errors(folder / PAGE, found.predicted, found.left_out, found.facts, found.notes)


# ---- what is asked for -------------------------------------------------------------------------------------------
def _asked(config: PredictErrorConfig, cells: TrainingScreen) -> list[Combination]:
    """Return the combinations to predict the error for.

    Raises:
        InputError: Some of those that the job names cannot be predicted; all are listed with the reason.
    """
    given = _given(config, [label.name for label in cells.vocabulary.labels])
    if given is None:
        return unmeasured(cells.screen)
    found, problems = [], []
    for where, classes in given:
        own, wrong = _as_in_the_data(classes, cells, where)
        if not wrong:
            pair = cells.pair(own)
            wrong = [f"{where}: {problem}" for problem in _unpredictable(pair, cells)]
            if pair in found:
                wrong = [f"{where}: {' + '.join(pair)} is named twice; name it once"]
            found.append(pair)
        problems += wrong
    if problems:
        more = [f"and {len(problems) - SHOWN} more"] if len(problems) > SHOWN else []
        raise InputError("\n".join([*problems[:SHOWN], *more]))
    return found


def _given(config: PredictErrorConfig, labels: Sequence[str]) -> list[tuple[str, dict[str, str]]] | None:
    """Return the combinations that the job names, each with its place for messages; None if it names none."""
    if config.combinations is not None:
        return [(f"combinations[{i}]", dict(classes)) for i, classes in enumerate(config.combinations)]
    if config.conditions is None:
        return None
    table = read_table(Path(config.conditions).expanduser(), "conditions")
    where = f"conditions: {Path(config.conditions).name}, row"
    return [
        (f"{where} {i + 1}", {x: name for x in labels if x in row and (name := class_name(row[x])) is not None})
        for i, row in enumerate(table.to_dict("records"))
    ]


def _as_in_the_data(classes: dict[str, str], cells: TrainingScreen, where: str) -> tuple[dict[str, str], list[str]]:
    """Return classes as the data call them, and what is wrong with them."""
    names = [label.name for label in cells.vocabulary.labels]
    problems = [f"{where} has no {name}; give a class for each label: {', '.join(names)}"
                for name in names if name not in classes]  # fmt: skip
    own: dict[str, str] = {}
    for name, value in classes.items():
        try:
            own[name] = cells.vocabulary.label(name).class_of(value)
        except UnknownNameError as error:
            problems.append(f"{where}.{name}: {error}")
    return own, problems


def _unpredictable(pair: Combination, cells: TrainingScreen) -> Sequence[str]:
    """Return why nothing can be said of a combination; empty if something can."""
    screen, name = cells.screen, " + ".join(pair)
    n = {key: len(rows) for key, rows in screen.members.items()}
    if pair[1] == screen.control:
        return [f"{name} is the control itself"]
    if pair in n:
        return [f"{name} was measured: {n[pair]} training cells; ask for combinations that were not"]
    if n.get((pair[0], screen.control), 0) < MIN_CELLS:
        return [f"{name}: {pair[0]} has {n.get((pair[0], screen.control), 0)} control cells ({screen.control}), and "
                f"at least {MIN_CELLS} are needed"]  # fmt: skip
    if not screen.sources(*pair):
        return [f"{name}: no other context has {MIN_CELLS} cells of both {pair[1]} and {screen.control}, so nothing is "
                "known of this treatment"]  # fmt: skip
    return []


def read_predictions(path: Path) -> pd.DataFrame:
    """Read the table of predicted errors; classes stay text."""
    table = pd.read_csv(path, dtype=str, keep_default_na=False)
    numbers = [c for c in table if c.endswith(("_low", "_high")) or c.removeprefix("free_") in
               ("delta_pearson", "energy_over_floor")]  # fmt: skip
    return table.assign(**{c: pd.to_numeric(table[c]) for c in numbers})
