"""Profiles the columns of obs and var: classes, missing values, columns with the same content.

A column's *partition* is how it groups the cells. Two columns with the same partition hold the same information under
other names; a column whose every class lies inside one class of another is finer than it.
"""

from __future__ import annotations

from typing import Any, Literal

import numpy as np
import pandas as pd

from pipeline.data.labels import label_names, measurements
from pipeline.data.validation.gene_names import ensembl_columns, has_unique_ids, unique_columns

Kind = Literal["classes", "yes or no", "whole numbers", "few numbers", "decimal numbers"]
MAX_COMPARED = 400  # classes of a column that is compared with others
MAX_COLUMNS = 200  # of obs that are profiled; an untrusted table may have any number


def obs_profile(obs: pd.DataFrame) -> dict[str, dict[str, Any]]:
    """Return for each column: kind, n_missing, n_classes, smallest, middle, largest, only, same_as, numbers.

    smallest, middle and largest are numbers of cells of a class. `only` is the class of a column that has a single one,
    else None. `same_as` names an earlier column with the same partition, or is None. `numbers` holds the least, the
    least positive and the greatest of a column of numbers, or is None.
    """
    found: dict[str, dict[str, Any]] = {}
    partitions: dict[str, np.ndarray] = {}
    for column in list(obs.columns)[:MAX_COLUMNS]:
        values = obs[column]
        names = label_names(values)
        absent = pd.isna(names)
        codes, classes = pd.factorize(names)
        sizes = np.sort(np.bincount(codes[codes >= 0], minlength=len(classes))) if len(classes) else np.zeros(1, int)
        found[str(column)] = {
            "kind": _kind(values),
            "n_missing": int(absent.sum()),
            "n_classes": len(classes),
            "smallest": int(sizes[0]),
            "middle": int(sizes[len(sizes) // 2]),
            "largest": int(sizes[-1]),
            "only": str(classes[0]) if len(classes) == 1 else None,
            "same_as": next((k for k, other in partitions.items() if _same(codes, other)), None),
            "numbers": _range(values),
        }
        if 2 <= len(classes) <= MAX_COMPARED:
            partitions[str(column)] = codes
    return found


def var_profile(var: pd.DataFrame) -> dict[str, Any]:
    """Return columns of var that hold unique Ensembl ids; whether the index does; columns of unique text."""
    index = pd.DataFrame({"index": var.index.astype(str)})
    texts = [str(c) for c in var.columns if not pd.api.types.is_numeric_dtype(var[c])]
    return {
        "index_is_ensembl": bool(ensembl_columns(index)),
        "index_is_unique": bool(var.index.is_unique),
        "ensembl": [c for c in ensembl_columns(var) if has_unique_ids(var[c])],
        "unique": unique_columns(var),
        "texts": texts,
    }


def _kind(values: pd.Series) -> Kind:
    if isinstance(values.dtype, pd.CategoricalDtype):
        return "classes"
    if pd.api.types.is_bool_dtype(values):
        return "yes or no"
    if pd.api.types.is_integer_dtype(values):
        return "whole numbers"
    if not pd.api.types.is_numeric_dtype(values):
        return "classes"
    if measurements(values):
        return "decimal numbers"
    # A gap, or another file, makes whole numbers to floats.
    return "few numbers" if (values.dropna() % 1).any() else "whole numbers"


def _range(values: pd.Series) -> tuple[float, float | None, float] | None:
    """Return the least, the least positive and the greatest of numbers; None for anything else."""
    if not pd.api.types.is_numeric_dtype(values) or pd.api.types.is_bool_dtype(values):
        return None
    numbers = values.dropna().to_numpy(np.float64)
    numbers = numbers[np.isfinite(numbers)]
    if not len(numbers):
        return None
    positive = numbers[numbers > 0]
    return float(numbers.min()), float(positive.min()) if len(positive) else None, float(numbers.max())


def _same(a: np.ndarray, b: np.ndarray) -> bool:
    """Whether codes in the order of first appearance are one partition, with the same missing values."""
    return bool(np.array_equal(a, b))
