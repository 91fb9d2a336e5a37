"""Labels whose classes are values, as an ingest would have fitted them, for small models."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from scldm.data.label_type import LabelType
from scldm.data.labels.values import Number, Sets, Vectors, number_key
from scldm.data.labels.vectors import NamedVectors, fit_vectors
from scldm.data.vocabulary import LabelVocabulary


def number(
    name: str = "dose", classes: Sequence[str] = ("1", "3", "10"), kind: str = "int64", **choices
) -> LabelVocabulary:
    values = Number.fit(classes, **choices)
    own = tuple(sorted(classes, key=lambda c: number_key(c, values.zero)))
    return LabelVocabulary(name, own, LabelType(kind, False), values)


def sets(name: str = "drugs", classes: Sequence[str] = ("A", "A+B", "B", "C"), **choices) -> LabelVocabulary:
    return LabelVocabulary(name, tuple(classes), values=Sets.fit(classes, classes, **choices))


def vectors(
    name: str = "gene",
    measured: Sequence[str] = ("A", "B", "C"),
    zero: Sequence[str] = (),
    width: int = 4,
    seed: int = 0,
) -> LabelVocabulary:
    """Vectors of the measured names and of D, E and F."""
    names = tuple(dict.fromkeys([*measured, "D", "E", "F"]))
    given = NamedVectors(names, np.random.default_rng(seed).normal(size=(len(names), width)))
    classes = tuple(sorted([*measured, *zero]))
    return LabelVocabulary(name, classes, values=Vectors(classes, fit_vectors(name, given, measured), tuple(zero)))
