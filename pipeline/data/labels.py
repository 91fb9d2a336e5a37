"""Columns of obs as labels: which values are missing, which are measurements and no classes, which name was meant."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

import numpy as np
import pandas as pd

MISSING = ("", "nan", "NaN", "None", "<NA>")  # how a missing label looks once it has been a string
MOST_DOSES = 100  # a float column of more different values was measured; of fewer it may be a dose or a day


def missing(values: pd.Series) -> np.ndarray:
    """Cells without a label: null, NaN, or what they become when saved as text."""
    absent = values.isna().to_numpy()
    if not pd.api.types.is_numeric_dtype(values):
        absent |= values.astype(object).isin(MISSING).to_numpy()
    return absent


def did_you_mean(name: str, available: Iterable[str]) -> str:
    """` (did you mean 'x'?)`, or the names there are."""
    available = [str(a) for a in available]
    near = difflib.get_close_matches(name, available, n=1, cutoff=0.5)
    hint = f"did you mean {near[0]!r}? " if near else ""
    return f"{hint}columns: {', '.join(available) or 'none'}"


def measurements(column: pd.Series) -> list[float]:
    """The different values of a column that was measured; empty if its values can be classes.

    Doses and days are numbers and classes: what was measured has fractions, and hardly a value twice.
    """
    if not pd.api.types.is_float_dtype(column):
        return []
    counts = column.dropna().value_counts(sort=False)
    values = counts.index.to_numpy(float)
    if len(values) < 2 or not (values % 1).any():
        return []
    alone = int((counts.to_numpy() == 1).sum())
    return sorted(values.tolist()) if len(values) > MOST_DOSES or 2 * alone > len(values) else []
