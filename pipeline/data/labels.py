"""Reads obs columns as labels: missing values, measurements that are no classes, suggestions for misspelled names."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

import numpy as np
import pandas as pd

MISSING = ("", "nan", "NaN", "None", "<NA>")  # missing labels that were converted to text
MAX_DOSES = 100  # a float column of more different values is a measurement; with fewer it may be a dose or a day


def missing(values: pd.Series) -> np.ndarray:
    """Return which cells have no label: null, NaN, or their forms when saved as text."""
    absent = values.isna().to_numpy()
    if not pd.api.types.is_numeric_dtype(values):
        absent |= values.astype(object).isin(MISSING).to_numpy()
    return absent


def did_you_mean(name: str, available: Iterable[str]) -> str:
    """Return `did you mean 'x'?` if a name is close, followed by the available names."""
    available = [str(a) for a in available]
    near = difflib.get_close_matches(name, available, n=1, cutoff=0.5)
    hint = f"did you mean {near[0]!r}? " if near else ""
    return f"{hint}columns: {', '.join(available) or 'none'}"


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
