"""Conditions in a notebook: one as a dictionary, many as a table, read as a generate job reads its table."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, TypeAlias

import numpy as np
import pandas as pd
from pydantic import ValidationError

from scldm.api.arguments import Arguments
from scldm.data.user_table import TableError, whole_table
from scldm.data.vocabulary import Vocabulary
from scldm.flow.config import SamplerConfig
from scldm.generation.request import Request, RequestRow
from scldm.generation.request_table import RequestError, check_guidance, genes_to_write, read_rows
from scldm.text import did_you_mean

LISTS = (list, tuple, np.ndarray, pd.Index, pd.Series, pd.api.extensions.ExtensionArray)  # several classes of a label
Conditions: TypeAlias = pd.DataFrame | pd.Series | Sequence[Mapping[str, Any]] | Mapping[str, Any] | None


def read_conditions(
    given: Arguments, conditions: Any, n: Any, sampler: SamplerConfig, genes: Any, vocabulary: Vocabulary
) -> tuple[Request, np.ndarray | None]:
    """Return the request, and the ids of the genes to keep (None: all).

    Args:
        given: Arguments of the call, with the problems of those that were checked before.

    Raises:
        RequestError: The request or an argument is invalid; all problems are listed.
    """
    problems = given.problems
    table = _table(given, conditions, n, vocabulary)
    known = [x.name for x in vocabulary.labels]
    problems += [p.replace("generate.sampler.", "") for p in check_guidance(sampler.guidance, known)]
    rows = [] if table is None else read_rows(table, "conditions", vocabulary, problems)
    kept = None
    try:
        kept = kept_genes(given, genes, vocabulary)
    except RequestError as error:
        problems.append(str(error).replace("generate.genes: ", "genes: "))
    if problems:
        raise RequestError("\n".join(dict.fromkeys(problems)))
    return Request(tuple(RequestRow(**row) for row in rows)), kept


def sampler_settings(given: Arguments, sampler: Any, guidance: Any, *, loaded: str) -> SamplerConfig:
    """Return the settings of the sampler, with `guidance` in place of theirs if it is given.

    Args:
        loaded: Which weights of the flow the model was loaded with; other ones cannot be requested.
    """
    if not isinstance(sampler, (SamplerConfig, Mapping, type(None))):
        given.problems.append(f"sampler must be a dictionary of settings or a SamplerConfig; got {sampler!r}")
        sampler = None
    values = sampler.model_dump() if isinstance(sampler, SamplerConfig) else dict(sampler or {})
    named = sampler.model_fields_set if isinstance(sampler, SamplerConfig) else values
    if "weights" in named and values["weights"] != loaded:
        given.problems.append(
            f"sampler.weights is {values['weights']!r}, and the model was loaded with {loaded!r}: leave it out, or "
            "load the others with scldm.load(folder, weights=…)"
        )
    values["weights"] = loaded
    if guidance is not None:
        values["guidance"] = guidance
    if "guidance" in values:
        own, where = values["guidance"], "guidance" if guidance is not None else "sampler.guidance"
        values["guidance"] = (
            {label: given.number(f"{where}[{label!r}]", w) for label, w in own.items()}
            if isinstance(own, Mapping)
            else given.number(where, own, or_text="a dictionary of label and scale, or ")
        )
    values = {k: v.item() if isinstance(v, np.generic) else v for k, v in values.items()}
    try:
        return SamplerConfig.model_validate(values)
    except ValidationError as error:
        for e in error.errors():
            place = ".".join(map(str, ("sampler", *e["loc"])))
            given.problems.append(f"{place}: {e['msg']}; got {e['input']!r}{_meant(e, SamplerConfig)}")
        scales = values.get("guidance", 1.0)  # whose labels are checked against the model, together with the rest
        return SamplerConfig(guidance={str(k): w for k, w in scales.items()} if isinstance(scales, dict) else scales)


def library_size_argument(given: Arguments, value: Any) -> float | str:
    """Return a library size as a number, or "statistics"; anything else is a problem."""
    if isinstance(value, str) and value == "statistics":
        return value
    return given.number("library_size", value, above=0.0, or_text="'statistics' or ")


def _meant(error: Any, model: type[SamplerConfig]) -> str:
    if error["type"] != "extra_forbidden":
        return ""
    hint = did_you_mean(str(error["loc"][0]), list(model.model_fields))
    return f" ({hint})" if hint else f" (known: {', '.join(model.model_fields)})"


def kept_genes(given: Arguments, genes: Any, vocabulary: Vocabulary, *, argument: str = "genes") -> np.ndarray | None:
    """Return the ids of the genes to keep; None: all.

    Args:
        argument: Of the call, for messages.

    Raises:
        RequestError: The model has no such genes.
    """
    if genes is None:
        return None
    names = [genes] if isinstance(genes, str) or not isinstance(genes, Iterable) else list(genes)
    if isinstance(genes, (str, Mapping)) or not all(isinstance(name, str) for name in names):
        given.problems.append(f"{argument} must be a list of gene ids or names; got {genes!r}")
        return None
    return genes_to_write([str(name) for name in names], vocabulary)


def _table(given: Arguments, conditions: Any, n: Any, vocabulary: Vocabulary) -> pd.DataFrame | None:
    """Return a table with a column n_cells; None after a problem."""
    if n is not None:
        n = given.whole("n", n, least=0)
    table = _rows(given, conditions, vocabulary)
    if table is not None and n is None and isinstance(conditions, pd.DataFrame) and "n_cells" not in table:
        table = _of_cells(given, table, vocabulary)
    if table is not None and "n_cells" in table and n is not None:
        given.problems.append("the table says n_cells, and n says it again: leave one out")
    elif table is not None and "n_cells" not in table:
        if n is None:
            given.problems.append("how many cells? Give n, or the table a column n_cells")
        else:
            table = table.assign(n_cells=n)
    if table is not None and "n_cells" not in table:
        table = table.assign(n_cells=0)  # so that the other columns are checked too
    return table


def _of_cells(given: Arguments, table: pd.DataFrame, vocabulary: Vocabulary) -> pd.DataFrame | None:
    """Return a table of cells, such as the obs of real ones, as one of conditions: a cell of each row's labels.

    Columns that are no labels of the model describe the real cells. None after a problem.
    """
    labels = [x.name for x in vocabulary.labels]
    if missing := [name for name in labels if name not in table]:
        given.problems.append(
            "how many cells? Give n, or the table a column n_cells; a table with all labels of the model stands for "
            f"one cell of each row, and this one lacks {', '.join(missing)}"
        )
        return None
    return table[labels].assign(n_cells=1)


def _rows(given: Arguments, conditions: Any, vocabulary: Vocabulary) -> pd.DataFrame | None:
    """Return the conditions as a table; None after a problem."""
    if isinstance(conditions, (pd.DataFrame, pd.Series)):
        try:
            return whole_table(conditions, "conditions", vocabulary)
        except TableError as error:
            given.problems.append(str(error))
            return None
    if isinstance(conditions, Mapping):
        conditions = _spread(given, conditions)
    elif isinstance(conditions, (int, np.integer)) and not isinstance(conditions, bool):
        given.problems.append(f"conditions is {conditions}; for cells without labels write generate(n={conditions})")
        return None
    rows = [{}] if conditions is None else conditions
    rows = [rows] if isinstance(rows, str) or not isinstance(rows, Iterable) else list(rows)
    if not all(isinstance(row, Mapping) for row in rows):
        given.problems.append(
            "conditions must be a dictionary {label: class}, a table, a list of dictionaries, or None; got "
            f"{conditions!r}"[:200]
        )
        return None
    return pd.DataFrame([dict(row) for row in rows])


def _spread(given: Arguments, conditions: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return the rows of a dictionary: one, or if values are lists of classes as many as these have entries."""
    lists = {k: list(v) for k, v in conditions.items() if isinstance(v, LISTS)}
    lengths = {k: len(v) for k, v in lists.items()}
    if len(set(lengths.values())) > 1:
        named = ", ".join(f"{k} {n}" for k, n in lengths.items())
        given.problems.append(f"conditions: lists of classes must be of one length; got {named}")
        return []
    return [{**conditions, **{k: v[i] for k, v in lists.items()}} for i in range(next(iter(lengths.values()), 1))]
