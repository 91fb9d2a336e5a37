"""From a request in names to a recipe in numbers, and what is worth saying of it."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import pandas as pd

from pipeline.config.job import GenerateConfig
from scldm.data.library_size import LibrarySizes, condition_key
from scldm.data.vocabulary import Vocabulary
from scldm.errors import InputError
from scldm.generation.cell_maker import Recipe
from scldm.generation.recipe import recipe_of as request_recipe
from scldm.generation.request import Request, Settings
from scldm.generation.request_table import RequestError


def recipe_of(
    request: Request, config: GenerateConfig, vocabulary: Vocabulary, sizes: LibrarySizes, strategy: str
) -> Recipe:
    """As `scldm.generation.recipe.recipe_of`, with the settings of a job.

    Raises:
        InputError: what the models cannot be asked.
    """
    try:
        return request_recipe(request, settings_of(config), vocabulary, sizes, strategy)
    except RequestError as error:
        raise InputError(str(error)) from error


def settings_of(config: GenerateConfig) -> Settings:
    return Settings(config.sampler.guidance, config.library_size)


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
