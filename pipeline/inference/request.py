"""The request of a generation job: what it asks for, how it is cut into shards, and its form in numbers.

A request is a table of conditions with a number of cells each. Cell ids count over the whole request, row after row;
shard k holds ids [k * shard_size, (k + 1) * shard_size). So a shard is a function of (request, k).

Columns of the table: a label of the model, `n_cells`, `guidance` (or `guidance.<label>`) and `library_size`. A column
that is a label is a label, whatever its name. `scldm.generation` reads the rows. A job resolves its request once,
before anything is computed, and records it in the stage's folder.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from pipeline.config.job import GenerateConfig
from pipeline.config.stages import LibrarySizesOf
from pipeline.core.files import write_json_atomic
from scldm.data.library_size import LibrarySizes, condition_key
from scldm.data.user_table import read_table
from scldm.data.vocabulary import UnknownNameError, Vocabulary
from scldm.errors import InputError
from scldm.generation.request import Request, RequestRow, Settings
from scldm.generation.request_table import check_columns, check_guidance, genes_to_write, read_rows

if TYPE_CHECKING:
    from pipeline.data.ingest.dataset import IngestedDataset
    from scldm.flow.config import Distilled
    from scldm.generation.cell_maker import Recipe
    from scldm.nn.config import VAEConfig

MAX_CELLS = 10**9
REQUEST = "request.json"  # in the folder of a generate stage


def read_request(config: GenerateConfig, vocabulary: Vocabulary, compositions: Mapping[str, pd.DataFrame]) -> Request:
    """Return the request of a config, checked against what the model was trained on.

    Args:
        compositions: For `like`: split -> table of label columns and n_cells.

    Raises:
        InputError: with all problems.
    """
    _require_one_selection(config)
    if (given := _given_table(config)) is not None:
        table, where = given.table, given.where
    elif config.per_label is not None:
        table, where = _per_label(config.per_label, vocabulary), "generate.per_label"
    elif config.like is not None:
        table, where = _scaled(compositions[config.like], config.n_cells), f"generate.like={config.like}"
    else:
        table, where = pd.DataFrame({"n_cells": [config.n_cells]}), "generate.n_cells"
    problems = check_guidance(config.sampler.guidance, [x.name for x in vocabulary.labels])
    try:
        genes_to_write(config.genes, vocabulary)
    except InputError as error:
        problems.append(str(error))
    rows = read_rows(table, where, vocabulary, problems)
    if not problems:
        problems += _too_many(where, sum(r["n_cells"] for r in rows))
    if problems:
        raise InputError("\n".join(problems))
    return Request(tuple(RequestRow(**row) for row in rows))


def resolve_request(config: GenerateConfig, data: IngestedDataset) -> Request:
    """Resolve the settings of a job to rows of labels and numbers, on an ingested dataset; see `read_request`."""
    return read_request(config, data.vocabulary, {config.like: data.composition(config.like)} if config.like else {})


def record_request(folder: Path, request: Request) -> None:
    """Write the resolved request into the folder of its stage, for later readers."""
    write_json_atomic(folder / REQUEST, {"digest": request.digest, "rows": request.as_plain()})


def recorded_request(folder: Path) -> Request | None:
    """Return the request that a stage recorded; None if it recorded none, as versions before 0.2 did.

    Raises:
        InputError: The file is damaged.
    """
    path = folder / REQUEST
    if not path.is_file():
        return None
    try:
        recorded = json.loads(path.read_text())
        request = Request.from_plain(recorded["rows"])
        whole = request.digest == recorded["digest"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"{path} is damaged ({error}); delete it and run the job again") from error
    if not whole:
        raise InputError(f"{path} is damaged (its digest does not match its rows); delete it and run the job again")
    return request


def check_choice(config: GenerateConfig, labels: Sequence[str] | None = None) -> list[str]:
    """Return the problems of a request that show without knowing the classes of the model.

    Args:
        labels: Labels that the model will have; None if they are not known.
    """
    try:
        _require_one_selection(config)
        given = _given_table(config)
    except InputError as error:
        return [str(error)]
    problems: list[str] = []
    if given is not None:
        n_cells = check_columns(given.table, given.where, labels, problems).n_cells
        if not problems and len(n_cells):
            problems += _too_many(given.where, int(n_cells.sum()))
    if labels is not None:
        problems += check_guidance(config.sampler.guidance, labels)
        names = config.per_label or {}
        problems += [
            f"generate.per_label: no label {name!r}; the model will know: {', '.join(labels) or 'none'}"
            for name in names
            if name not in labels
        ]
    return problems


def n_shards(request: Request, shard_size: int) -> int:
    """Return the number of shards, at least one: a request for no cells gives one empty, valid file."""
    return max(1, -(-request.n_cells // shard_size))


# ---- tables ------------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class _GivenTable:
    table: pd.DataFrame
    where: str  # for messages


def _given_table(config: GenerateConfig) -> _GivenTable | None:
    """Return the table that a config names or holds; None if it asks for cells in another way."""
    if config.conditions is not None:
        return _GivenTable(read_conditions(Path(config.conditions)), f"generate.conditions: {config.conditions}")
    return None if config.cells is None else _GivenTable(pd.DataFrame(config.cells), "generate.cells")


def _too_many(where: str, n_cells: int) -> list[str]:
    return [] if n_cells <= MAX_CELLS else [f"{where} asks for {n_cells:,} cells; at most {MAX_CELLS:,} in one job"]


def _require_one_selection(config: GenerateConfig) -> None:
    given = [k for k in ("conditions", "cells", "per_label", "like") if getattr(config, k) is not None]
    if len(given) > 1:
        raise InputError(f"generate takes one of conditions, cells, per_label, like; got {' and '.join(given)}")
    if not given and config.n_cells is None:
        raise InputError(
            "generate does not say which cells to make; give one of conditions (a table), cells (the table inline), "
            "per_label ({cell_type: 100}), like (a split), or n_cells alone for cells without a label"
        )
    if config.n_cells is not None and given and given != ["like"]:
        raise InputError(f"generate.n_cells goes with `like` or stands alone; with {given[0]} the table says how many")


def read_conditions(path: Path) -> pd.DataFrame:
    """Read a table of conditions: CSV, TSV or Parquet. A file that did not change is parsed once per process."""
    path = path.expanduser()
    about = path.stat() if path.is_file() else None
    return _parsed_table(path, about and (about.st_size, about.st_mtime_ns)).copy()


@lru_cache(maxsize=4)
def _parsed_table(path: Path, state: tuple[int, int] | None) -> pd.DataFrame:
    return read_table(path, "generate.conditions")


def _per_label(per_label: Mapping[str, int], vocabulary: Vocabulary) -> pd.DataFrame:
    rows: list[dict[str, str | int]] = []
    for name, n in per_label.items():
        try:
            classes = vocabulary.label(name).classes
        except UnknownNameError as error:
            raise InputError(f"generate.per_label: {error}") from error
        rows += [{name: c, "n_cells": n} for c in classes]
    return pd.DataFrame(rows)


def _scaled(composition: pd.DataFrame, n_cells: int | None) -> pd.DataFrame:
    """Scale the composition of a split to n_cells in all, by largest remainders; None leaves it as it is."""
    if n_cells is None:
        return composition
    share = composition["n_cells"] / composition["n_cells"].sum() * n_cells
    n = np.floor(share).astype(int)
    n.iloc[np.argsort(-(share - n).to_numpy(), kind="stable")[: n_cells - int(n.sum())]] += 1
    return composition.assign(n_cells=n)[n > 0]


# ---- in numbers --------------------------------------------------------------------------------------------------
def recipe_of(
    request: Request, config: GenerateConfig, vocabulary: Vocabulary, sizes: LibrarySizes, strategy: str,
    *, counts: bool = True, distilled: Distilled | None = None,
) -> Recipe:  # fmt: skip
    """Return class ids, guidance and library-size statistics of every row, see `scldm.generation.recipe.recipe_of`."""
    from scldm.generation import recipe  # imports torch, which the check of a request does not need

    return recipe.recipe_of(
        request, settings_of(config), vocabulary, sizes, strategy, counts=counts, distilled=distilled
    )


def settings_of(config: GenerateConfig) -> Settings:
    """Return the defaults of rows. Statistics are those that the caller passes, whatever their place."""
    size = config.library_size
    return Settings(config.sampler.guidance, size if isinstance(size, float) else "statistics")


def vectors_of(config: GenerateConfig, request: Request, vae: VAEConfig) -> np.ndarray | None:
    """Return the condition vectors of an adaLN decoder, one for each row, (r, d); None for other decoders.

    Raises:
        InputError: The decoder needs vectors and the job names none, or others than it takes.
    """
    from scldm.generation.decoder_condition import DecoderConditionError, decoder_vectors, read_vectors

    try:
        given = None if config.decoder_condition is None else read_vectors(config.decoder_condition)
        return decoder_vectors(vae, given, len(request.rows), per="each row of the request")
    except DecoderConditionError as error:
        raise DecoderConditionError(f"generate: {error}") from error


def values_problems(config: GenerateConfig, request: Request) -> list[str]:
    """Return what a request sets for counts, of a VAE with a Gaussian head, which draws none."""
    from scldm.generation.expression_draw import expression_problems  # imports SciPy

    size = config.library_size
    found = expression_problems(
        request,
        settings_of(config),
        temperature=config.sampler.temperature,
        sizes_of=size.of if isinstance(size, LibrarySizesOf) else None,
    )
    return [f"generate: {problem}" for problem in found]


def notes_on(
    request: Request, training: pd.DataFrame | None, sizes: LibrarySizes, config: GenerateConfig, *,
    counts: bool = True, vocabulary: Vocabulary | None = None,
) -> list[str]:  # fmt: skip
    """Describe what a reader of the cells should know: combinations and values without training cells, borrowed
    library sizes.

    Args:
        training: Composition of the training cells; None if it is not known.
        vocabulary: Of the model, whose labels may be values.
    """
    labels = [] if training is None else [c for c in training.columns if c != "n_cells"]
    unseen, fallback = [], []
    for row in request.rows:
        given = {k: v for k, v in row.condition.items() if v is not None}
        if given and training is not None and not _seen(given, training, labels):
            unseen.append(_text(given))
        if counts and row.library_size is None and not isinstance(config.library_size, float):
            level = sizes.of(row.condition).level
            if given and level != condition_key(given):
                fallback.append(f"{_text(given)} from {level}")
    notes = []
    if config.conditions is not None and training is not None and not config.conditions.endswith(".parquet"):
        notes += _notes_on_space(request, training, labels)
    if vocabulary is not None and vocabulary.values:
        from scldm.checkpoints.asked_values import value_notes  # imports torch

        notes += value_notes(vocabulary, (row.condition for row in request.rows))
    if unseen:
        notes.append(f"No training cell has {_first(unseen)}: what the model says of them is composed, not learned.")
    if fallback:
        cells = "cells" if isinstance(config.library_size, LibrarySizesOf) else "training cells"
        notes.append(f"Too few {cells} for library sizes of their own: {_first(fallback)}.")
    return notes


def _notes_on_space(request: Request, training: pd.DataFrame, labels: list[str]) -> list[str]:
    """Describe classes that a table file cannot tell apart, because white space around a field is no part of it."""
    notes = []
    for label in labels:
        classes = {str(c) for c in training[label].dropna()}
        used = {c for row in request.rows if (c := row.condition.get(label)) is not None}
        for name in sorted(used):
            others = sorted(c for c in classes - {name} if c.strip() == name.strip())
            if others:
                notes.append(
                    f"{label} {name!r} was generated; the data also have {', '.join(map(repr, others))}, which differs "
                    "only in white space around it: a table file cannot name both, generate.cells can."
                )
    return notes


def _seen(given: Mapping[str, str], training: pd.DataFrame, labels: list[str]) -> bool:
    found = np.ones(len(training), dtype=bool)
    for label, value in given.items():
        if label in labels:
            found &= (training[label] == value).to_numpy()
    return bool(found.any())


def _text(given: Mapping[str, str]) -> str:
    return ", ".join(f"{k} {v}" for k, v in given.items())


def _first(names: list[str], most: int = 5) -> str:
    names = list(dict.fromkeys(names))
    return "; ".join(names[:most]) + (f"; and {len(names) - most} more" if len(names) > most else "")
