"""Reads obs columns as labels: missing values, measurements that are no classes, suggestions for misspelled names."""

from __future__ import annotations

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
