"""The name of a class: one text for a value, whatever type a reader left it in.

pandas, concat, Parquet and SOMA change the type of a column: a gap makes 1 to 1.0, and a file of another type makes a
number to an object. Every place that compares labels therefore asks here for their names.

* A boolean is "True" or "False".
* A whole number has one name: 1, 1.0 and float32(1.0) are "1". Other numbers have the fewest digits that identify them.
* Text stays as it is: "001" is "001", and "None" is a class.
* A null and an empty text are no class: None.
"""

from __future__ import annotations

import datetime
import re
from collections import defaultdict
from collections.abc import Iterable, Sequence
from decimal import Decimal
from typing import Any

import numpy as np
import pandas as pd

_POINT = re.compile(r"-?(0|[1-9][0-9]{0,14})(\.[0-9]{1,12})?")
_DIGITS = 15  # that every float64 holds; one with more may be a float32 that was widened


def class_name(value: Any) -> str | None:
    """Return the name of a value's class; None for a null or an empty text."""
    return None if is_null(value) else class_text(value) or None


def is_null(value: Any) -> bool:
    """Return whether a value is None, NaN, NaT or pandas' NA."""
    return value is None or (pd.api.types.is_scalar(value) and bool(pd.isna(value)))


def class_text(value: Any) -> str:
    """Return the text of a value that is not null."""
    if isinstance(value, (bool, np.bool_)):
        return str(bool(value))
    if isinstance(value, (float, np.floating, Decimal)):
        return _number(value)
    if isinstance(value, bytes):
        return value.decode("utf-8", "replace")
    if isinstance(value, datetime.datetime) and value.tzinfo is None and value.time() == datetime.time():
        return value.date().isoformat()
    return str(value)


def _number(value: float | np.floating | Decimal) -> str:
    if np.isfinite(float(value)) and value == int(value):
        return str(int(value))
    text = str(value)
    if isinstance(value, (float, np.float64)):
        with np.errstate(over="ignore"):
            narrow = np.float32(value)
        if sum(c.isdigit() for c in text.partition("e")[0].lstrip("-0.")) > _DIGITS and float(narrow) == float(value):
            return str(narrow)
    return text


def class_names(values: Iterable[Any]) -> np.ndarray:
    """Return the names of a column, (n,) object; None for a null or an empty text."""
    if not isinstance(values, (pd.Series, pd.Index, pd.Categorical, np.ndarray)):
        values = list(values)
    column = pd.Series(values) if len(values) else pd.Series(values, dtype=object)
    if column.dtype == np.float16:
        column = widened(column)
    if isinstance(column.dtype, pd.CategoricalDtype):
        names = np.array([*(class_name(c) for c in column.cat.categories), None], dtype=object)
        return names[column.cat.codes.to_numpy()]
    if column.dtype != object:
        codes, found = pd.factorize(column)
        return np.array([*(class_name(v) for v in found), None], dtype=object)[codes]
    names_of: dict[tuple[type, Any], str | None] = {}  # by type too: True == 1
    out = np.empty(len(column), dtype=object)
    for i, value in enumerate(column.tolist()):
        key = (type(value), value)
        try:
            if key not in names_of:
                names_of[key] = class_name(value)
            out[i] = names_of[key]
        except TypeError:  # a value that has no hash
            out[i] = class_name(value)
    return out


def widened(column: pd.Series) -> pd.Series:
    """Return 16-bit floats as 32-bit ones with the same digits: 0.1 stays 0.1, where a plain cast makes 0.099975586."""
    return column.astype(str).astype(np.float32)


class ClassFinder:
    """Finds the class that a name in a user's table or settings stands for.

    It is the class of that name, or else the only class that differs from it in white space around it or in the
    notation of a plain number: 1.0 stands for the class 1, and 1 for a class whose text is 1.0.
    """

    def __init__(self, classes: Iterable[str]) -> None:
        self._classes = dict.fromkeys(classes)
        self._alike: dict[str, list[str]] = defaultdict(list)
        for name in self._classes:
            self._alike[_written(name)].append(name)

    def find(self, name: str) -> str | None:
        """Return the class; None if no class fits, or several do."""
        if name in self._classes:
            return name
        alike = self._alike.get(_written(name), [])
        return alike[0] if len(alike) == 1 else None


def _written(name: str) -> str:
    """Return a name without white space around it; a plain number with the fewest digits. 007 and 1e5 may be names."""
    name = name.strip()
    return class_text(Decimal(name).normalize()) if _POINT.fullmatch(name) else name


def near_duplicates(names: Sequence[str]) -> list[tuple[str, ...]]:
    """Return groups of names that differ only by case, white space or the notation of a number ("1" and "1.0")."""
    groups: dict[str, list[str]] = defaultdict(list)
    for name in names:
        groups[_folded(name)].append(name)
    return [tuple(group) for group in groups.values() if len(group) > 1]


def _folded(name: str) -> str:
    plain = " ".join(name.split()).casefold()
    try:
        return class_text(float(plain))
    except (ValueError, OverflowError):
        return plain
