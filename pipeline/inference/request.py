"""What a generation job is asked for, and how it is cut into shards.

A request is a table of conditions with a number of cells each. Cell ids count over the whole request, row after row;
shard k holds ids [k * shard_size, (k + 1) * shard_size). So a shard is a function of (request, k).

Columns of the table: a label of the model, `n_cells`, `guidance` (or `guidance.<label>`) and `library_size`. A column
that is a label is a label, whatever its name.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from pipeline.config.job import GenerateConfig
from pipeline.inference.request_table import check_guidance, read_rows
from pipeline.inference.request_table import genes_to_write as genes_to_write
from scldm.data.vocabulary import UnknownNameError, Vocabulary
from scldm.errors import InputError
from scldm.generation.request import Request as Request
from scldm.generation.request import RequestRow as RequestRow

MOST_CELLS = 10**9


def read_request(config: GenerateConfig, vocabulary: Vocabulary, compositions: Mapping[str, pd.DataFrame]) -> Request:
    """The request of a config, checked against what the model was trained on.

    Args:
        compositions: For `like`: split -> table of label columns and n_cells.

    Raises:
        InputError: with all problems at once.
    """
    _exactly_one(config)
    if config.conditions is not None:
        table, where = read_table(Path(config.conditions)), config.conditions
    elif config.cells is not None:
        table, where = pd.DataFrame(config.cells), "generate.cells"
    elif config.per_label is not None:
        table, where = _per_label(config.per_label, vocabulary), "generate.per_label"
    elif config.like is not None:
        table, where = _scaled(compositions[config.like], config.n_cells), f"generate.like={config.like}"
    else:
        table, where = pd.DataFrame({"n_cells": [config.n_cells]}), "generate.n_cells"
    problems = check_guidance(config.sampler.guidance, vocabulary)
    try:
        genes_to_write(config.genes, vocabulary)
    except InputError as error:
        problems.append(str(error))
    rows = read_rows(table, where, vocabulary, problems)
    if not problems and sum(r["n_cells"] for r in rows) > MOST_CELLS:
        problems.append(
            f"{where} asks for {sum(r['n_cells'] for r in rows):,} cells; at most {MOST_CELLS:,} in one job"
        )
    if problems:
        raise InputError("\n".join(problems))
    return Request(tuple(RequestRow(**row) for row in rows))


def check_choice(config: GenerateConfig) -> list[str]:
    """What can be said of a request without knowing the model: problems, or nothing."""
    try:
        _exactly_one(config)
        if config.conditions is not None:
            read_table(Path(config.conditions))
    except InputError as error:
        return [str(error)]
    return []


def n_shards(request: Request, shard_size: int) -> int:
    """At least one: a request for no cells gives one empty, valid file."""
    return max(1, -(-request.n_cells // shard_size))


def _exactly_one(config: GenerateConfig) -> None:
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


def read_table(path: Path) -> pd.DataFrame:
    if not path.is_file():
        raise InputError(f"generate.conditions: no file {path}")
    try:
        if path.suffix == ".parquet":
            return pd.read_parquet(path)
        return pd.read_csv(path, sep="\t" if path.suffix == ".tsv" else ",", dtype=str, keep_default_na=True)
    except (ValueError, OSError) as error:
        raise InputError(f"generate.conditions: {path} is no readable CSV, TSV or Parquet table ({error})") from error


def _per_label(per_label: Mapping[str, int], vocabulary: Vocabulary) -> pd.DataFrame:
    rows: list[dict[str, Any]] = []
    for name, n in per_label.items():
        try:
            classes = vocabulary.label(name).classes
        except UnknownNameError as error:
            raise InputError(f"generate.per_label: {error}") from error
        rows += [{name: c, "n_cells": n} for c in classes]
    return pd.DataFrame(rows)


def _scaled(composition: pd.DataFrame, n_cells: int | None) -> pd.DataFrame:
    """The composition of a split, at n_cells in all (largest remainders), or as it is."""
    if n_cells is None:
        return composition
    share = composition["n_cells"] / composition["n_cells"].sum() * n_cells
    n = np.floor(share).astype(int)
    n.iloc[np.argsort(-(share - n).to_numpy(), kind="stable")[: n_cells - int(n.sum())]] += 1
    return composition.assign(n_cells=n)[n > 0]
