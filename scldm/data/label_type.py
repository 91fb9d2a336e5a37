"""The type that a label has in the data, and a column of that type from names of classes.

Inside the code a class is a name (`class_names`). Generated obs has the type of the training data, so that both can be
concatenated and written.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from scldm.data.class_names import class_text

STRING, BOOLEAN = "string", "boolean"


@dataclass(frozen=True)
class LabelType:
    """Type of the values of a label."""

    values: str = STRING  # or "boolean", or a numpy type of numbers: "int64", "float32"
    categorical: bool = True  # text always is, whatever it was
    order: tuple[str, ...] = ()  # names of an ordered categorical, first to last; empty: without an order

    def __post_init__(self) -> None:
        if self.values not in (STRING, BOOLEAN) and np.dtype(self.values).kind not in "iuf":
            raise ValueError(
                f"a label's values may be string, boolean, or a numpy type of numbers; got {self.values!r}"
            )

    @classmethod
    def of(cls, column: pd.Series) -> LabelType:
        """Return the type of a column of obs."""
        categorical = isinstance(column.dtype, pd.CategoricalDtype)
        values = column.cat.categories if categorical else column
        order: tuple[str, ...] = ()
        if categorical and column.cat.ordered:
            order = tuple(dict.fromkeys(class_text(c) for c in values))
        if pd.api.types.is_bool_dtype(values.dtype):
            return cls(BOOLEAN, categorical, order)
        if pd.api.types.is_numeric_dtype(values.dtype) and getattr(values.dtype, "kind", "") in "iuf":
            return cls(str(values.dtype).lower(), categorical, order)
        # Objects of numbers come from joining categoricals: anndata writes no others.
        kind = {"integer": "int64", "floating": "float64", "mixed-integer-float": "float64", "boolean": BOOLEAN}.get(
            pd.api.types.infer_dtype(values, skipna=True) if values.dtype == object else "", STRING
        )
        return cls(kind, True, order)

    def column(self, names: Sequence[str | None], classes: Sequence[str], *, gaps: bool) -> Any:
        """Return values of this type, (n,).

        Args:
            names: Class of each cell; None: no class.
            classes: Classes that become categories, in the order of the vocabulary.
            gaps: Whether any cell, here or in another part of the same table, has no class.
        """
        if self.categorical:
            place = {name: i for i, name in enumerate(self.order)}
            kept = sorted(classes, key=lambda c: place.get(c, len(place))) if self.order else list(classes)
            at = {name: i for i, name in enumerate(kept)}
            codes = np.array([-1 if x is None else at[x] for x in names], dtype=np.int64)
            categories = pd.Index(self._typed(kept), dtype=object if self.values == STRING else None)
            return pd.Categorical.from_codes(codes, categories=categories, ordered=bool(self.order))
        given = np.array([x is not None for x in names], dtype=bool)
        if np.dtype(self._numpy).kind == "f":
            out = np.full(len(given), np.nan, dtype=self._numpy)
        else:
            out = np.zeros(len(given), dtype=self._numpy)
        out[given] = self._typed([x for x in names if x is not None])
        if not gaps or out.dtype.kind == "f":
            return out
        array = pd.arrays.BooleanArray if out.dtype.kind == "b" else pd.arrays.IntegerArray
        return array(out, ~given)

    @property
    def _numpy(self) -> str:
        return "bool" if self.values == BOOLEAN else self.values

    def _typed(self, names: Sequence[str]) -> np.ndarray:
        if self.values == STRING:
            return np.array(names, dtype=object)
        if self.values == BOOLEAN:
            return np.array([{"True": True, "False": False}[x] for x in names], dtype=bool)
        whole = np.dtype(self.values).kind in "iu"
        return np.array([int(x) if whole else float(x) for x in names], dtype=self.values)

    def to_json(self) -> dict[str, Any]:
        """Return the type as plain data."""
        return {"values": self.values, "categorical": self.categorical, "order": list(self.order)}

    @classmethod
    def from_json(cls, plain: dict[str, Any]) -> LabelType:
        """Build a type from the data of `to_json`."""
        return cls(plain["values"], plain["categorical"], tuple(plain["order"]))


TEXT = LabelType()
