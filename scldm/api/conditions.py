"""Conditions in a notebook: one as a dictionary, many as a table, read as a generate job reads its table."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

import numpy as np
import pandas as pd

from scldm.data.user_table import TableError, whole_table
from scldm.data.vocabulary import Vocabulary
from scldm.flow.config import SamplerConfig
from scldm.generation.request import Request, RequestRow
from scldm.generation.request_table import RequestError, check_guidance, genes_to_write, read_rows

Conditions: TypeAlias = pd.DataFrame | pd.Series | Sequence[Mapping[str, Any]] | Mapping[str, str | None] | None


def read_conditions(
    conditions: Conditions, n: int | None, sampler: SamplerConfig, genes: Sequence[str] | None, vocabulary: Vocabulary
) -> tuple[Request, np.ndarray | None]:
    """Return the request, and the ids of the genes to keep (None: all).

    Raises:
        RequestError: The request is invalid; all problems are listed.
    """
    table = _table(conditions, n, vocabulary)
    problems = [p.replace("generate.sampler.", "") for p in check_guidance(sampler.guidance, vocabulary)]
    rows = read_rows(table, "conditions", vocabulary, problems)
    kept = None
    try:
        kept = genes_to_write(genes, vocabulary)
    except RequestError as error:
        problems.append(str(error))
    if problems:
        raise RequestError("\n".join(problems))
    return Request(tuple(RequestRow(**row) for row in rows)), kept


def _whole(table: pd.DataFrame | pd.Series, vocabulary: Vocabulary) -> pd.DataFrame:
    try:
        return whole_table(table, "conditions", vocabulary)
    except TableError as error:
        raise RequestError(str(error)) from error


def sampler_settings(
    given: SamplerConfig | Mapping[str, Any] | None, guidance: Mapping[str, float] | float | None
) -> SamplerConfig:
    """Return the settings of the sampler, with `guidance` in place of theirs if it is given."""
    settings = given if isinstance(given, SamplerConfig) else SamplerConfig.model_validate(dict(given or {}))
    if guidance is None:
        return settings
    return SamplerConfig.model_validate({**settings.model_dump(), "guidance": guidance})


def _table(conditions: Conditions, n: int | None, vocabulary: Vocabulary) -> pd.DataFrame:
    """Return a table with a column n_cells."""
    if isinstance(conditions, (pd.DataFrame, pd.Series)):
        table = _whole(conditions, vocabulary)
    elif isinstance(conditions, Mapping):
        table = pd.DataFrame([dict(conditions)])
    else:
        table = pd.DataFrame([{}] if conditions is None else [dict(row) for row in conditions])
    if "n_cells" in table:
        if n is not None:
            raise RequestError("the table says n_cells, and n says it again: leave one out")
        return table
    if n is None:
        raise RequestError("how many cells? Give n, or the table a column n_cells")
    return table.assign(n_cells=n)
