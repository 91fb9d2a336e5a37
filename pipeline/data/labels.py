"""Reads obs columns as labels: names, missing values, measurements that are no classes.

The name of a value is that of `scldm.data.class_names`. Missing are nulls, empty texts, and the texts that nulls become
when a column is saved as text (`MISSING_TEXT`, or `ingest.missing_text`). "None" and "NA" are not among them: control
cells are often called so. They are classes, and are pointed out.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd

from pipeline.config.ingest import MISSING_TEXT
from scldm.data.class_names import class_names, class_text, is_null

LIKE_MISSING = ("none", "na", "n/a", "nan", "null", "<na>")  # in lower case
MAX_DOSES = 100  # a float column of more different values is a measurement; with fewer it may be a dose or a day


def label_names(values: pd.Series, missing_text: Sequence[str] = MISSING_TEXT) -> np.ndarray:
    """Return the class of each cell, (n,) object; None if it has none."""
    names = class_names(values)
    if len(missing_text) and not pd.api.types.is_numeric_dtype(values):
        names[pd.Series(names, dtype=object).isin(missing_text).to_numpy()] = None
    return names


def missing(values: pd.Series, missing_text: Sequence[str] = MISSING_TEXT) -> np.ndarray:
    """Return which cells have no label, bool (n,)."""
    return pd.isna(label_names(values, missing_text))


def spellings(values: pd.Series, missing_text: Sequence[str] = MISSING_TEXT) -> str:
    """Describe what the missing values of a column are: `62 null, 3 empty, 10 'nan'`."""
    absent = values[missing(values, missing_text)].astype(object)
    texts = absent.map(lambda x: "null" if is_null(x) else repr(class_text(x)) if class_text(x) else "empty")
    return ", ".join(f"{n} {text}" for text, n in texts.value_counts().items())


def like_missing(counts: Mapping[str, int]) -> dict[str, int]:
    """Return the classes, with their cells, that are spelled like a missing value."""
    return {name: n for name, n in counts.items() if name.strip().lower() in LIKE_MISSING}


def measurements(column: pd.Series) -> list[float]:
    """Return the different values of a column of measurements; empty if its values can be classes.

    Doses and days are numbers and classes; measurements have fractions, and hardly any value occurs twice.
    """
    if not pd.api.types.is_float_dtype(column):
        return []
    counts = column.dropna().value_counts(sort=False)
    values = counts.index.to_numpy(float)
    if len(values) < 2 or not (values % 1).any():
        return []
    alone = int((counts.to_numpy() == 1).sum())
    return sorted(values.tolist()) if len(values) > MAX_DOSES or 2 * alone > len(values) else []
