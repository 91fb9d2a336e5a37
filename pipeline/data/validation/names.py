"""Checks names of cells, and classes of labels."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence

import numpy as np
import pandas as pd

from pipeline.config.ingest import MISSING_TEXT
from pipeline.data.findings import FIRST, Finding, error, warning
from pipeline.data.labels import label_names, like_missing, measurements, missing, spellings
from pipeline.data.validation.odd_names import odd_findings
from scldm.data.class_names import near_duplicates
from scldm.text import choices_hint, shown

MIN_CELLS = 30  # fewer may leave a split without cells, and cannot be trained on and scored
MAX_CLASSES = 1000  # a label with more is probably a name or a measurement


def size_findings(n_cells: int) -> Iterator[Finding]:
    """Check the number of cells, of all files together."""
    if n_cells < MIN_CELLS:
        yield error(f"{n_cells} cells are too few to split, train and score", f"at least {MIN_CELLS} are needed")


def cell_findings(names: pd.Series) -> Iterator[Finding]:
    """Check names of cells, one per row."""
    yield from size_findings(len(names))
    if len(twice := names[names.duplicated()].unique()):
        yield warning(f"{len(twice)} obs names occur more than once", "cells are told apart by soma_joinid",
                      count=len(twice), first=twice)  # fmt: skip
    yield from odd_findings("obs names", names)


def label_findings(
    obs: pd.DataFrame, labels: Sequence[str], names: pd.Series, *, missing_text: Sequence[str] = MISSING_TEXT,
    drop_missing: bool = False, renamed: bool = True, named_by: Mapping[str, str] = {}, values: Collection[str] = (),
) -> Iterator[Finding]:  # fmt: skip
    """Check the requested label columns.

    Args:
        names: Names of the cells, for examples.
        missing_text: As `ingest.missing_text`.
        drop_missing: Whether cells without a label are left out later, and so are no error.
        renamed: Whether the source has a setting that renames columns, `ingest.source.columns`.
        named_by: Place that names a column which is no label, for messages.
        values: Labels whose classes are values (`ingest.label_values`), which may be many and alike.
    """
    for label in labels:
        if label not in obs:
            hint = choices_hint(label, [shown(c) for c in obs.columns])
            if label in named_by:
                yield error(
                    f"{named_by[label]}: obs has no column {label!r} ({hint})",
                    "name one that it has, or leave the column out",
                )
                continue
            columns = f", or map it with ingest.source.columns: {{{label}: <column of the file>}}" if renamed else ""
            yield error(f"obs has no column {label!r} ({hint})", f"name one in ingest.labels{columns}")
            continue
        absent = np.flatnonzero(missing(obs[label], missing_text))
        if len(absent) == len(obs) > 0:
            yield error(f"no cell has a {label}", "name another label in ingest.labels", count=len(absent),
                        first=names.iloc[absent[:FIRST]])  # fmt: skip
            continue
        if len(absent) and not drop_missing:
            remedy = _remedy_of_missing(obs[label], missing_text)
            yield error(f"{len(absent)} of {len(obs)} cells have no {label}", remedy,
                        count=len(absent), first=names.iloc[absent[:FIRST]])  # fmt: skip
        if label in values:
            continue
        if measured := measurements(obs[label]):
            yield error(f"{label} holds {len(measured):,} different measurements, not classes",
                        "cut it into ranges with pandas.cut, name another label, or make it a number with "
                        f"ingest.label_values.{label}.type=number",
                        count=len(measured), first=measured)  # fmt: skip
            continue
        counts = class_counts(obs[label], missing_text)
        if single := [c for c, n in counts.items() if n == 1]:
            yield warning(f"{len(single)} classes of {label} have one cell", "they cannot be both learned and scored: "
                          "join them with others or leave them out", count=len(single), first=single)  # fmt: skip
        if len(counts) > MAX_CLASSES:
            yield warning(f"{label} has {len(counts):,} classes", "is it a label? Each class is learned by itself",
                          count=len(counts))  # fmt: skip
        if obs[label].dtype == object and len({type(x) for x in obs[label].dropna()}) > 1:
            yield warning(f"{label} mixes types", "they are compared as text")
        yield from spelling_findings(label, counts)
        yield from odd_findings(f"classes of {label}", list(counts))


def _remedy_of_missing(column: pd.Series, missing_text: Sequence[str]) -> str:
    """Return what to do with missing labels, and which texts were taken as missing."""
    remedy = "leave them out with ingest.missing_label: drop, or label them"
    found = spellings(column, missing_text)
    if not any(repr(text) in found for text in missing_text):
        return remedy
    keep = 'ingest.missing_text: [] (on the command line --missing-text "") keeps texts as classes'
    return f"{remedy}; missing are {found}; {keep}"


def spelling_findings(label: str, counts: Mapping[str, int]) -> Iterator[Finding]:
    """Warn of classes that may be meant otherwise: named like another, or like a missing value.

    Args:
        counts: Cells of each class.
    """
    if alike := near_duplicates(list(counts)):
        groups = [" and ".join(f"{name!r} ({counts[name]:,})" for name in group) for group in alike]
        what = f"{sum(map(len, alike))} classes of {label} differ only by case, white space or the notation of a number"
        yield warning(what, "they are learned as different classes: give them one name if they are the same",
                      count=len(alike), first=groups)  # fmt: skip
    if words := like_missing(counts):
        named = [f"{name!r} ({n:,} cells)" for name, n in words.items()]
        yield warning(f"{len(words)} classes of {label} are named like a missing value", "they are learned as classes; "
                      "if they are none, name them in ingest.missing_text", count=len(words), first=named)  # fmt: skip


def class_counts(column: pd.Series, missing_text: Sequence[str] = MISSING_TEXT) -> dict[str, int]:
    """Count the cells of each class that occurs, largest first."""
    names = label_names(column, missing_text)
    return {str(k): int(n) for k, n in pd.Series(names, dtype=object).value_counts().items() if n}


def suggested_labels(obs: pd.DataFrame, names: pd.Series) -> list[str]:
    """Return columns that look like labels: few classes, most of them with several cells."""
    found = []
    for column in obs.columns:
        values = obs[column]
        fractions = pd.api.types.is_float_dtype(values) and (values.dropna() % 1).any()
        if fractions or not 2 <= values.nunique() <= min(MAX_CLASSES, len(names) // 3):
            continue
        found.append(str(column))
    return found
