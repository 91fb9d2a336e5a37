"""What the classes of a label mean, where they are more than different names: numbers, sets, or rows of a table.

A cell's condition is the id of a class, whatever the label is. A label of values has a row of *features* for each class
besides, from which the network computes the embedding. So a value that no cell had can be asked for: it is one more
class, whose features are known.

    Number  a dose, a time, an age: the standardised value and smooth functions of it
    Sets    several perturbations at once: which members a set has
    Vectors a name in a table that the user brought: its vector (`vectors.py`)

A class has one text, which `canonical` returns: 1e1 is 10, and B+A is A+B. Classes of `zero` are the untreated
control: their features are zeros, and one more feature says so.

Shape letters: n classes, f features.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar

import numpy as np

from scldm.data.class_names import class_text
from scldm.data.labels.vectors import VectorTable, nearest_row
from scldm.text import did_you_mean, shown

FREQUENCIES = (0.5, 1.0, 2.0)  # of sines and cosines, per standard deviation: the fastest turns once in 3 of them
LISTED = 8


class ValueTextError(ValueError):
    """Raised for a text that is no value of a label. The message says why."""


class LabelValues(ABC):
    """Values of a label: their texts, their features, and how far one is from those of the training cells."""

    kind: ClassVar[str]
    pooled: ClassVar[bool] = False  # whether features add up: the embedding is then a plain sum
    trained: tuple[str, ...]  # classes with training cells
    zero: tuple[str, ...]  # classes of the untreated control

    @property
    @abstractmethod
    def n_features(self) -> int:
        """Number of features of a class, f."""

    @abstractmethod
    def canonical(self, name: str) -> str:
        """Return the text of the class that a name stands for.

        Raises:
            ValueTextError: The name is no value of the label.
        """

    @abstractmethod
    def features(self, classes: Sequence[str]) -> np.ndarray:
        """Return the features of classes, (n, f) float32."""

    @abstractmethod
    def note(self, label: str, value: str) -> str | None:
        """Return what a reader of generated cells should know of a value; None for one with training cells."""

    @abstractmethod
    def summary(self) -> str:
        """Return in words what the values are, and what was measured of them."""

    @abstractmethod
    def to_json(self) -> dict[str, Any]:
        """Return the settings and facts as plain data."""

    def asked(self, name: str) -> str:
        """Return the text of a class that may be asked for, whether any cell has it or not.

        Raises:
            ValueTextError: There is no such value.
        """
        return self.canonical(name)

    @property
    def meaning(self) -> dict[str, Any]:
        """Return what two labels must share for the same features to mean the same."""
        return {k: v for k, v in self.to_json().items() if k not in ("trained", "unit")}

    @cached_property
    def _trained(self) -> frozenset[str]:
        return frozenset(self.trained)

    def _flagged(self, classes: Sequence[str], rows: np.ndarray) -> np.ndarray:
        """Return features with zeros for the control, and a last column that says which classes are it."""
        if not self.zero:
            return rows.astype(np.float32)
        flag = np.array([[c in self.zero] for c in classes], dtype=np.float32).reshape(-1, 1)
        return np.concatenate([np.where(flag > 0, 0, rows), flag], axis=1).astype(np.float32)


# ---- numbers -----------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Number(LabelValues):
    """Numbers on a linear or a logarithmic scale, standardised over the classes with training cells."""

    kind: ClassVar[str] = "number"
    trained: tuple[str, ...]
    mean: float  # over the classes with training cells, in the scale
    sd: float
    unit: str = ""
    scale: str = "linear"  # or "log", to the base 10
    zero: tuple[str, ...] = ()

    @classmethod
    def fit(cls, trained: Iterable[str], *, unit: str = "", scale: str = "linear", zero: Sequence[str] = ()) -> Number:
        """Take mean and standard deviation of the classes with training cells.

        Raises:
            ValueTextError: There are fewer than two numbers, which tell nothing about others.
        """
        classes = sorted(set(trained), key=lambda c: number_key(c, zero))
        values = [float(c) for c in classes if c not in zero]
        if len(set(values)) < 2:
            beside = " beside those of the untreated control" if zero else ""
            raise ValueTextError(
                f"the training cells have {'one value' if values else 'no value'} of it{beside} "
                f"({', '.join(classes) or 'none'}), and a number needs two or more"
            )
        scaled = np.log10(values) if scale == "log" else np.array(values)
        return cls(tuple(classes), float(scaled.mean()), float(scaled.std()), unit, scale, tuple(zero))

    @property
    def n_features(self) -> int:
        """Number of features of a class, f."""
        return 1 + 2 * len(FREQUENCIES) + bool(self.zero)

    def canonical(self, name: str) -> str:
        """Return the shortest text of a number; a name of `zero` stays as it is."""
        return number_text(name, scale=self.scale, zero=self.zero)

    def features(self, classes: Sequence[str]) -> np.ndarray:
        """Return the standardised value, its sines and cosines, and whether it is the control, (n, f) float32."""
        values = np.array([math.nan if c in self.zero else float(c) for c in classes], dtype=np.float64)
        scaled = np.log10(values) if self.scale == "log" else values
        s = ((scaled - self.mean) / self.sd).reshape(-1, 1)
        angles = s * np.array(FREQUENCIES)
        return self._flagged(classes, np.concatenate([s, np.sin(angles), np.cos(angles)], axis=1))

    def note(self, label: str, value: str) -> str | None:
        """Return that a value is between or outside those of the training cells."""
        if value in self._trained or value in self.zero:
            return None
        known = [c for c in self.trained if c not in self.zero]
        below = [c for c in known if float(c) < float(value)]
        above = [c for c in known if float(c) > float(value)]
        asked = f"{label} {self._with_unit(value)}"
        if not above:
            largest = self._with_unit(known[-1])
            return f"{asked} is above the largest of the training cells, {largest}: extrapolated."
        if not below:
            smallest = self._with_unit(known[0])
            return f"{asked} is below the smallest of the training cells, {smallest}: extrapolated."
        return f"{asked} has no training cells: interpolated between {below[-1]} and {self._with_unit(above[0])}."

    def summary(self) -> str:
        """Return unit, scale and the range of the training cells."""
        known = [c for c in self.trained if c not in self.zero]
        unit = f" in {self.unit}" if self.unit else ""
        scale = "logarithmic" if self.scale == "log" else "linear"
        text = f"a number{unit}, {scale} scale, {known[0]} to {known[-1]} ({len(known)} values)"
        return text + (f"; untreated: {', '.join(self.zero)}" if self.zero else "")

    def to_json(self) -> dict[str, Any]:
        """Return the settings and facts as plain data."""
        return {
            "type": self.kind,
            "trained": list(self.trained),
            "mean": self.mean,
            "sd": self.sd,
            "unit": self.unit,
            "scale": self.scale,
            "zero": list(self.zero),
        }

    def _with_unit(self, value: str) -> str:
        return f"{value} {self.unit}".rstrip()


def number_text(name: str, *, scale: str = "linear", zero: Sequence[str] = ()) -> str:
    """Return the shortest text of a finite number: 1e1 and 10.0 are 10.

    Args:
        scale: On "log" it must be above 0.
        zero: Names that stand for the control, which may be 0 or no number.

    Raises:
        ValueTextError: It is no such number.
    """
    plain = name.strip()
    if plain in zero:
        return plain
    try:
        value = math.nan if "_" in plain else float(plain)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        comma = plain.replace(",", ".", 1)
        decimal = "," in plain and comma.replace(".", "", 1).lstrip("-").isdigit()
        raise ValueTextError(f"{shown(name)!r} is no number" + (f" (write {comma})" if decimal else ""))
    text = class_text(value)
    if text in zero:
        return text
    if scale == "log" and value <= 0:
        raise ValueTextError(f"{text} has no logarithm: a value on a log scale is above 0")
    return text


def number_key(text: str, zero: Sequence[str]) -> tuple[bool, float, str]:
    """Return the key that sorts texts of numbers: those of `zero` first, then increasing."""
    return (text not in zero, 0.0 if text in zero else float(text), text)


# ---- sets --------------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Sets(LabelValues):
    """Sets of members in one text, "A+B": without order, and a member counts once."""

    kind: ClassVar[str] = "set"
    pooled: ClassVar[bool] = True
    trained: tuple[str, ...]
    members: tuple[str, ...]  # that occur in the data, sorted
    separator: str = "+"
    zero: tuple[str, ...] = ()  # names of no perturbation: alone the empty set, beside members nothing

    @classmethod
    def fit(
        cls, trained: Iterable[str], classes: Iterable[str], *, separator: str = "+", zero: Sequence[str] = ()
    ) -> Sets:
        """Take the members of all classes.

        Args:
            trained: Classes with training cells.
            classes: All classes of the data.
        """
        found = {m for c in classes for m in _members(c, separator) if m not in zero}
        return cls(tuple(sorted(trained)), tuple(sorted(found)), separator, tuple(zero))

    @property
    def n_features(self) -> int:
        """Number of features of a class, f."""
        return len(self.members) + bool(self.zero)

    def canonical(self, name: str) -> str:
        """Return the members, sorted and joined; names of `zero` are left out unless there is nothing else."""
        return set_text(name, separator=self.separator, zero=self.zero)

    def asked(self, name: str) -> str:
        """Return the text of a set of known members.

        Raises:
            ValueTextError: A member is unknown; all of them are named.
        """
        text = self.canonical(name)
        if unknown := [m for m in _members(text, self.separator) if m not in {*self.members, *self.zero}]:
            hint = did_you_mean(unknown[0], [*self.members, *self.zero])
            known = f"it knows {_listed(self.members)}"
            raise ValueTextError(f"the model knows no member {', '.join(map(repr, unknown))} ({hint or known})")
        return text

    def features(self, classes: Sequence[str]) -> np.ndarray:
        """Return which members a set has, and whether it is the control, (n, f) float32."""
        at = {m: i for i, m in enumerate(self.members)}
        rows = np.zeros((len(classes), len(self.members)), dtype=np.float32)
        for row, name in enumerate(classes):
            for member in _members(name, self.separator):
                if member in at:
                    rows[row, at[member]] = 1
        return self._flagged(classes, rows)

    def note(self, label: str, value: str) -> str | None:
        """Return that a set is composed of its members, and which of them no training cell has."""
        if value in self._trained or value in self.zero:
            return None
        known = {m for c in self.trained for m in _members(c, self.separator)}
        if new := [m for m in _members(value, self.separator) if m not in known]:
            return f"{label} {value}: no training cell has {', '.join(new)}: what it adds was never learned."
        return f"{label} {value} has no training cells: composed of its members, which other training cells have."

    def summary(self) -> str:
        """Return the members and how they are written."""
        text = f"a set of {len(self.members)} members joined by {self.separator!r} ({_listed(self.members)})"
        return text + (f"; untreated: {', '.join(self.zero)}" if self.zero else "")

    def to_json(self) -> dict[str, Any]:
        """Return the settings and facts as plain data."""
        return {
            "type": self.kind,
            "trained": list(self.trained),
            "members": list(self.members),
            "separator": self.separator,
            "zero": list(self.zero),
        }


def _members(name: str, separator: str) -> list[str]:
    return [part.strip() for part in name.split(separator)]


def set_text(name: str, *, separator: str, zero: Sequence[str] = ()) -> str:
    """Return the members of a set, each once, sorted and joined.

    Raises:
        ValueTextError: A member is empty, as in "A++B".
    """
    parts = _members(name, separator)
    if not all(parts):
        raise ValueTextError(f"{shown(name)!r} has an empty member between {separator!r}")
    kept = sorted({p for p in parts if p not in zero})
    return separator.join(kept) or min(parts)


# ---- vectors -----------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Vectors(LabelValues):
    """Names with a vector each: all names of the table can be asked for."""

    kind: ClassVar[str] = "vector"
    trained: tuple[str, ...]
    table: VectorTable
    zero: tuple[str, ...] = ()

    @property
    def n_features(self) -> int:
        """Number of features of a class, f."""
        return self.table.width + bool(self.zero)

    def canonical(self, name: str) -> str:
        """Return a name without white space around it, unless the table has it with that."""
        return name if name in self.table.rows or name in self.zero else name.strip()

    def asked(self, name: str) -> str:
        """Return a name that has a vector, or is the control.

        Raises:
            ValueTextError: It is neither.
        """
        text = self.canonical(name)
        if text not in self.table.rows and text not in self.zero:
            hint = did_you_mean(text, [*self.table.names, *self.zero])
            known = f"the first of {len(self.table.names):,} names are {_listed(self.table.names)}"
            raise ValueTextError(f"the model's table has no vector of {shown(text)!r} ({hint or known})")
        return text

    def features(self, classes: Sequence[str]) -> np.ndarray:
        """Return the vectors of names, and whether one is the control, (n, f) float32."""
        rows = np.zeros((len(classes), self.table.width), dtype=np.float32)
        known = [i for i, c in enumerate(classes) if c not in self.zero]
        rows[known] = self.table.values[[self.table.rows[classes[i]] for i in known]]
        return self._flagged(classes, rows)

    def note(self, label: str, value: str) -> str | None:
        """Return that a name was never measured, and the measured one whose vector is nearest."""
        if value in self._trained or value in self.zero:
            return None
        measured = [c for c in self.trained if c not in self.zero]
        name, cosine = nearest_row(self.table, value, measured)
        return (
            f"{label} {value} has no training cells: asked for by its vector alone; the nearest with training cells is "
            f"{name}, cosine {cosine:.2f}."
        )

    def summary(self) -> str:
        """Return how many names have vectors, and how many of them have training cells."""
        measured = len([c for c in self.trained if c not in self.zero])
        text = f"a name with a vector: {len(self.table.names):,} names, {measured} with training cells"
        return text + (f"; untreated: {', '.join(self.zero)}" if self.zero else "")

    def to_json(self) -> dict[str, Any]:
        """Return the settings and facts as plain data; the vectors are in a file of their own."""
        return {
            "type": self.kind,
            "trained": list(self.trained),
            "names": list(self.table.names),
            "width": self.table.width,
            "digest": self.table.digest,
            "zero": list(self.zero),
        }


def _listed(names: Sequence[str]) -> str:
    return ", ".join(map(shown, names[:LISTED])) + (", …" if len(names) > LISTED else "")


# ---- files -------------------------------------------------------------------------------------------------------
def values_from_json(label: str, plain: dict[str, Any], table: VectorTable | None = None) -> LabelValues:
    """Build values from the data of `to_json`.

    Args:
        table: The vectors of a label of type vector.
    """
    own: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in plain.items() if k != "type"}
    kinds: dict[str, type[Number | Sets]] = {"number": Number, "set": Sets}
    if plain["type"] in kinds:
        return kinds[plain["type"]](**own)
    if plain["type"] != "vector" or table is None:
        raise ValueError(f"label {label!r} has values of the type {plain['type']!r}, which this version does not know")
    return Vectors(own["trained"], table, own["zero"])
