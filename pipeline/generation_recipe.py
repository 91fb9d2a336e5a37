"""From a request in names to a recipe in numbers, and what is worth saying of it."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import pandas as pd

from pipeline.generation import Request, RequestRow
from pipeline.job import GenerateConfig
from pipeline.stage import InputError
from scldm.flow.guidance import JOINT
from scldm.generate import Recipe
from scldm.library_size import LibrarySizes, condition_key
from scldm.vocabulary import Vocabulary


def recipe_of(
    request: Request, config: GenerateConfig, vocabulary: Vocabulary, sizes: LibrarySizes, strategy: str
) -> Recipe:
    """Class ids, guidance and library-size statistics of every row.

    Raises:
        InputError: guidance that differs between labels of a model that guides them jointly; library sizes from
            statistics that the model has not got.
    """
    rows = request.rows
    ids = {x.name: x.encode([r.condition.get(x.name) for r in rows]) for x in vocabulary.labels}
    library = np.array([_library(r, config, sizes) for r in rows], dtype=np.float64).reshape(-1, 2)
    return Recipe(
        stops=np.cumsum([r.n_cells for r in rows]).astype(np.int64),
        conditions=ids,
        scale=_scales(rows, config, vocabulary, strategy),
        log_mean=library[:, 0],
        log_sd=library[:, 1],
    )


def row_guidance(row: RequestRow, config: GenerateConfig, labels: list[str]) -> dict[str, float]:
    """Scale of every label in a row: the row's own for the label, else the row's for all, else that of the settings."""
    default = config.sampler.guidance
    return {
        label: row.guidance.get(label, row.guidance.get("", default[label] if isinstance(default, dict) else default))
        for label in labels
    }


def _scales(
    rows: tuple[RequestRow, ...], config: GenerateConfig, vocabulary: Vocabulary, strategy: str
) -> dict[str, np.ndarray]:
    labels = [x.name for x in vocabulary.labels]
    if not labels:
        return {}
    found = [row_guidance(r, config, labels) for r in rows]
    if strategy != "joint":
        return {label: np.array([w[label] for w in found], dtype=np.float64) for label in labels}
    together = []
    for i, (row, w) in enumerate(zip(rows, found, strict=True)):
        asked = {label: w[label] for label in labels if row.condition.get(label) is not None} or {"": 1.0}
        if len(set(asked.values())) > 1:
            raise InputError(
                f"generate: row {i + 1} guides its labels by {asked}, and this model was trained with joint labels: "
                "they are guided together; give one scale (guidance), not one per label"
            )
        together.append(next(iter(asked.values())))
    return {JOINT: np.array(together, dtype=np.float64)}


def _library(row: RequestRow, config: GenerateConfig, sizes: LibrarySizes) -> tuple[float, float]:
    """Mean and deviation of the log of a row's library sizes."""
    fixed = row.library_size if row.library_size is not None else config.library_size
    if not isinstance(fixed, str):
        return float(np.log(fixed)), 0.0
    try:
        statistic = sizes.of(row.condition)
    except ValueError as error:
        raise InputError(
            f"generate: {error}; give generate.library_size a number, or the table such a column"
        ) from error
    return statistic.mean, statistic.sd


def notes_on(request: Request, training: pd.DataFrame, sizes: LibrarySizes, config: GenerateConfig) -> list[str]:
    """What a reader of the cells should know: combinations without training cells, library sizes from elsewhere."""
    labels = [c for c in training.columns if c != "n_cells"]
    unseen, fallback = [], []
    for row in request.rows:
        given = {k: v for k, v in row.condition.items() if v is not None}
        if given and not _seen(given, training, labels):
            unseen.append(_text(given))
        if row.library_size is None and isinstance(config.library_size, str):
            level = sizes.of(row.condition).level
            if given and level != condition_key(given):
                fallback.append(f"{_text(given)} from {level}")
    notes = []
    if unseen:
        notes.append(f"No training cell has {_some(unseen)}: what the model says of them is composed, not learned.")
    if fallback:
        notes.append(f"Too few training cells for library sizes of their own: {_some(fallback)}.")
    return notes


def _seen(given: Mapping[str, str], training: pd.DataFrame, labels: list[str]) -> bool:
    found = np.ones(len(training), dtype=bool)
    for label, value in given.items():
        if label in labels:
            found &= (training[label] == value).to_numpy()
    return bool(found.any())


def _text(given: Mapping[str, str]) -> str:
    return ", ".join(f"{k} {v}" for k, v in given.items())


def _some(names: list[str], most: int = 5) -> str:
    names = list(dict.fromkeys(names))
    return "; ".join(names[:most]) + (f"; and {len(names) - most} more" if len(names) > most else "")
