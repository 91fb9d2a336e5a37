"""Check the columns of a conditions table and the list of genes to write. All problems are collected."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from scldm.data.class_names import class_names
from scldm.data.text_genes import read_text_genes
from scldm.data.text_table import TextTableError
from scldm.data.user_table import COUNTED, N_CELLS, TableError, whole_table
from scldm.data.vocabulary import LabelVocabulary, UnknownNameError, Vocabulary
from scldm.errors import InputError
from scldm.text import did_you_mean


class RequestError(InputError, ValueError):
    """Raised for a request that the model cannot serve. The message lists all problems, one per line."""


_GROUPED = re.compile(r"[0-9]+[ ',\u00a0\u202f][0-9 '.,\u00a0\u202f]*")  # 1,000 or 0,5 or 1 000
MOST_NAMED = 10  # unknown classes in one message
GUIDANCE, LIBRARY_SIZE = "guidance", "library_size"
TOGETHER = "*"  # in the place of a label: the scale of all joint labels together, see `scldm.flow.guidance.JOINT`


def read_rows(table: pd.DataFrame, where: str, vocabulary: Vocabulary, problems: list[str]) -> list[dict[str, Any]]:
    """Return rows as arguments of `RequestRow`; problems are added to `problems`, and then there are no rows."""
    before = len(problems)
    known = [x.name for x in vocabulary.labels]
    try:
        table = whole_table(table, where, vocabulary)
    except TableError as error:
        problems.append(str(error))
        return []
    labels = [c for c in table.columns if c in known]
    numbers = check_columns(table, where, known, problems)
    names = {c: _classes(table[c], vocabulary.label(c), where, problems) for c in labels}
    if len(problems) > before:
        return []
    return [
        {
            "condition": {label: names[label][i] for label in labels},
            "n_cells": int(numbers.n_cells[i]),
            "guidance": {label: float(w[i]) for label, w in numbers.guidance.items() if not np.isnan(w[i])},
            "library_size": None if np.isnan(numbers.library_size[i]) else float(numbers.library_size[i]),
        }
        for i in range(len(table))
    ]


@dataclass(frozen=True)
class Numbers:
    """The columns of a conditions table that hold numbers, float64; NaN if empty or absent."""

    n_cells: np.ndarray
    library_size: np.ndarray
    guidance: dict[str, np.ndarray]  # by label, "" for all labels, "*" for all together beside single ones


def check_columns(table: pd.DataFrame, where: str, known: Sequence[str] | None, problems: list[str]) -> Numbers:
    """Read the numbers of a table, and add what is wrong with its columns to `problems`.

    Args:
        table: Without an index, see `whole_table`.
        known: Labels of the model; None: they are not known yet, and every other column may be one.
    """
    columns = [str(c) for c in table.columns]
    labels = [] if known is None else [c for c in columns if c in known]
    scales = {c: label for c in columns if c not in labels and (label := _guided(c)) is not None}
    settings = {N_CELLS, LIBRARY_SIZE, *scales}
    if N_CELLS not in columns:
        meant = [*(c for c in COUNTED if c in columns and c not in labels), *_alike(columns, N_CELLS)]
        hint = f"; rename {meant[0]!r} to n_cells" if meant else ""
        problems.append(f"{where} has no column n_cells (it has: {', '.join(columns)}){hint}")
    if known is not None:
        named = ", ".join(known) or "none"
        problems += [
            f"{where}: the model knows no label {c!r}{_meant(c, [*known, N_CELLS, LIBRARY_SIZE, GUIDANCE])}; it knows "
            f"{named}; leave that column or index level out"
            for c in columns
            if c not in known and c not in settings
        ]
        problems += [
            f"{where}: column {column} guides {label!r}, and the model knows no such label; it knows {named}"
            for column, label in scales.items()
            if label not in ("", TOGETHER, *known)
        ]
    return Numbers(
        _numbers(table, N_CELLS, where, problems, whole=True),
        _numbers(table, LIBRARY_SIZE, where, problems, above=0.0),
        {label: _numbers(table, column, where, problems) for column, label in scales.items()},
    )


def _alike(columns: Sequence[str], name: str) -> list[str]:
    return [c for c in columns if c.casefold().replace(" ", "_") == name]


def _classes(column: pd.Series, label: LabelVocabulary, where: str, problems: list[str]) -> list[str | None]:
    """Return the class of each row, as the model calls it; nothing after a problem.

    A class of a label whose classes are values need not be one of the data, see `LabelVocabulary.asked`.
    """
    names = class_names(column)
    found: dict[str | None, str | None] = {None: None}
    errors: dict[str, str] = {}
    for name in sorted({name for name in names if name is not None}):
        try:
            found[name] = label.asked(name)
        except UnknownNameError as error:
            errors[name] = str(error)
    if not errors:
        return [found[name] for name in names]
    unknown = [i for i, name in enumerate(names) if name in errors]
    told = "; ".join([*errors.values()][:MOST_NAMED])
    problems.append(f"{where}: {told}; row {unknown[0] + 1}" + (" is the first" if len(unknown) > 1 else ""))
    return []


def _meant(column: str, names: Sequence[str]) -> str:
    hint = did_you_mean(str(column), names)
    return f" ({hint})" if hint else ""


def check_guidance(guidance: float | Mapping[str, float], known: Sequence[str]) -> list[str]:
    """Return the problems of the guidance in the settings.

    Args:
        known: Labels of the model.
    """
    if not isinstance(guidance, Mapping):
        return []
    problems = [
        f"generate.sampler.guidance: the model knows no label {name!r}{_meant(name, known)}; it knows "
        f"{', '.join(known) or 'none'}"
        for name in guidance
        if name not in (TOGETHER, *known)
    ]
    if TOGETHER in guidance:
        return problems  # a label that is left out has none of its own
    if missing := [name for name in known if name not in guidance]:
        problems.append(f"generate.sampler.guidance names no scale for {', '.join(missing)}; give each label one")
    return problems


def genes_to_write(genes: Sequence[str] | str | None, vocabulary: Vocabulary) -> np.ndarray | None:
    """Return the ids of the genes to write, increasing, int64; None for all.

    Args:
        genes: Feature ids, or names that only one gene has; or a text file with one of them on each line.
        vocabulary: Genes of the model.

    Raises:
        RequestError: The vocabulary does not hold some genes, or several genes share a name; the message lists them.
    """
    if genes is None:
        return None
    known = {*vocabulary.feature_ids, *vocabulary.feature_names}
    requested = _listed(Path(genes), known) if isinstance(genes, str) else list(genes)
    by_id = {name: i for i, name in enumerate(vocabulary.feature_ids)}
    by_name: dict[str, list[int]] = {}
    for i, name in enumerate(vocabulary.feature_names):
        by_name.setdefault(name, []).append(i)
    ids_found, problems = set(), []
    for gene in requested:
        ids = [by_id[gene]] if gene in by_id else by_name.get(gene, [])
        if len(ids) == 1:
            ids_found.add(ids[0])
        elif ids:
            several = ", ".join(vocabulary.feature_ids[i] for i in ids[:4])
            problems.append(f"{gene} is the name of {len(ids)} genes; give the id: {several}")
        else:
            hint = did_you_mean(gene, [*by_name, *by_id])
            problems.append(f"no gene {gene!r}" + (f" ({hint})" if hint else ""))
    if not requested:
        problems.append("it names no gene; remove the setting to write all")
    if problems:
        more = f"; and {len(problems) - 10} more" if len(problems) > 10 else ""
        raise RequestError(f"generate.genes: {'; '.join(problems[:10])}{more}")
    return np.array(sorted(ids_found), dtype=np.int64)


def _listed(path: Path, known: Collection[str]) -> list[str]:
    if not path.expanduser().is_file():
        raise RequestError(
            f"generate.genes: no file {path}; give a list of genes, or a text file with one on each line"
        )
    try:
        return read_text_genes(path.expanduser(), known).ids
    except TextTableError as error:
        raise RequestError(f"generate.genes: {path} cannot be read: {error}") from None


def _guided(column: str) -> str | None:
    """Return the label of a guidance column: "" for all labels, None if it is another column."""
    if column == GUIDANCE:
        return ""
    return column.removeprefix(GUIDANCE + ".") if str(column).startswith(GUIDANCE + ".") else None


def _numbers(
    table: pd.DataFrame, column: str, where: str, problems: list[str], *, whole: bool = False,
    above: float | None = None,
) -> np.ndarray:  # fmt: skip
    """Return a column as float64; NaN if empty or absent, which only `whole` (n_cells) forbids."""
    if column not in table.columns:
        return np.full(len(table), np.nan)
    given = table[column]
    values = pd.to_numeric(given, errors="coerce").to_numpy(np.float64)
    values = np.where(given.map(lambda x: isinstance(x, (bool, np.bool_))), np.nan, values)  # pandas takes True for 1
    bad = np.isnan(values) & given.notna().to_numpy() | np.isinf(values)
    if whole:
        bad |= np.isnan(values) | (values < 0) | (values % 1 != 0)
    if above is not None:
        bad |= values <= above
    if bad.any():
        first = int(np.flatnonzero(bad)[0])
        kind = "whole numbers >= 0" if whole else "numbers" if above is None else f"numbers above {above:g}"
        problems.append(
            f"{where}: {column} must be {kind}; {int(bad.sum())} are not, the first in row {first + 1} "
            f"({given.iloc[first]!r}){_plainly(given.iloc[first])}"
        )
    return values


def _plainly(value: Any) -> str:
    """Return how to write a number that has separators, or a decimal comma."""
    grouped = isinstance(value, str) and _GROUPED.fullmatch(value)
    return "; write it with digits only, and a point before decimals: 1000, 0.5" if grouped else ""
