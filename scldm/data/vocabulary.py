"""Vocabulary: names and ids of genes and of label classes.

A gene's id is its position in the vocabulary (0 .. g-1). A class's id is its position among the sorted class names; one
more id, `n_classes`, is the *null* class that stands for "no label given" (classifier-free guidance).

A label whose classes are values (numbers, sets, names with vectors: `scldm.data.labels.values`) can be `extended` by
classes that no cell had. They come after the others, the null id moves to the new end, and neither JSON nor digest
knows of them.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from scldm.data.class_names import ClassFinder, class_name
from scldm.data.label_type import TEXT, LabelType
from scldm.data.labels.values import LabelValues, Number, ValueTextError, Vectors, values_from_json
from scldm.data.labels.vectors import FILE, VectorTable, save_tables
from scldm.errors import InputError
from scldm.text import did_you_mean


class UnknownNameError(InputError, ValueError):
    """Raised for a gene or class that the vocabulary does not hold. The message names it and the closest match."""


@dataclass(frozen=True)
class LabelVocabulary:
    """Classes of one label column, in the order of their ids."""

    name: str
    classes: tuple[str, ...]
    type: LabelType = TEXT  # of the label's values in the data
    values: LabelValues | None = None  # what the classes mean; None: they are only different
    n_asked: int = 0  # the last classes, which no cell of the data has

    def __post_init__(self) -> None:
        if len(set(self.classes)) != len(self.classes):
            raise ValueError(f"label {self.name!r} has duplicate classes")

    @property
    def null_id(self) -> int:
        """Id of the null class, which stands for "no label given"."""
        return len(self.classes)

    @cached_property
    def _ids(self) -> dict[str, int]:
        return {name: i for i, name in enumerate(self.classes)}

    @cached_property
    def _finder(self) -> ClassFinder:
        return ClassFinder(self.classes)

    def encode(self, values: Iterable[Any]) -> np.ndarray:
        """Return the ids of classes, int64; a missing value becomes the null class.

        A value is found by its `class_name`, or else as `find` does.

        Raises:
            UnknownNameError: Some names are not classes of the label; the message names all of them.
        """
        names = [class_name(v) for v in values]
        ids: dict[str | None, int] = {None: self.null_id}
        for name in {name for name in names if name is not None}:
            if (found := self.find(name)) is not None:
                ids[name] = self._ids[found]
        if unknown := sorted(str(name) for name in set(names) - ids.keys()):
            raise UnknownNameError("; ".join(self._explain(name) for name in unknown[:10]))
        return np.array([ids[name] for name in names], dtype=np.int64)

    def find(self, name: str) -> str | None:
        """Return the class that a name stands for, as `ClassFinder` or by its value; None if there is none."""
        if self.values is None:
            return self._finder.find(name)
        try:
            text = self.values.canonical(name)
        except ValueTextError:
            return None
        return text if text in self._ids else None

    def class_of(self, name: str) -> str:
        """Return the class that a name stands for, see `encode`.

        Raises:
            UnknownNameError: There is no such class.
        """
        return self.classes[int(self.encode([name])[0])]

    def knows(self, name: str) -> bool:
        """Return whether a name stands for a class."""
        return self.find(name) is not None

    def asked(self, name: str) -> str:
        """Return the class that a name in a request stands for, which need not be one that a cell of the data has.

        Raises:
            UnknownNameError: There is no such class, and the model cannot make one; the message says why.
        """
        if (found := self.find(name)) is not None:
            return found
        if self.values is None:
            raise UnknownNameError(self._explain(name))
        try:
            return self.values.asked(name)
        except ValueTextError as error:
            raise UnknownNameError(f"{self.name}: {error}") from error

    def extended(self, names: Iterable[str]) -> LabelVocabulary:
        """Return the vocabulary with more classes after its own.

        Args:
            names: Classes as `asked` returns them.
        """
        new = [name for name in dict.fromkeys(names) if name not in self._ids]
        return replace(self, classes=(*self.classes, *new), n_asked=self.n_asked + len(new)) if new else self

    @property
    def measured(self) -> tuple[str, ...]:
        """Classes of the data, without those that were asked for."""
        return self.classes[: len(self.classes) - self.n_asked]

    def decode(self, ids: Iterable[int]) -> list[str | None]:
        """Return the class names of ids; None for the null class."""
        return [None if i == self.null_id else self.classes[i] for i in ids]

    def column(self, ids: np.ndarray, used: np.ndarray) -> Any:
        """Return class ids as a column of the data's type; its categories are the classes that are used.

        Args:
            ids: Class ids of the cells, the null id for a cell without the label.
            used: Ids of the whole table, of which `ids` may be a part, so that all parts agree in their type.
        """
        present = set(np.unique(used).tolist())
        kept = [c for i, c in enumerate(self.classes) if i in present]
        return self._type_of(kept).column(self.decode(ids), kept, gaps=self.null_id in present)

    def _type_of(self, classes: list[str]) -> LabelType:
        """Return the type of the data, unless whole numbers were extended by others."""
        whole = isinstance(self.values, Number) and self.type.values.startswith(("int", "uint"))
        return (
            replace(self.type, values="float64") if whole and any("." in c or "e" in c for c in classes) else self.type
        )

    def _explain(self, name: str) -> str:
        if self.values is not None:
            try:
                self.values.canonical(name)
            except ValueTextError as error:
                return f"{self.name}: {error}"
        known = f"known: {', '.join(self.classes[:8])}" + (", …" if len(self.classes) > 8 else "")
        hint = did_you_mean(name, self.classes) or known
        return f"{self.name} has no class {name!r} ({hint})"


@dataclass(frozen=True)
class Vocabulary:
    """Genes and labels of one data set; saved as `vocabulary.json` in every model folder."""

    feature_ids: tuple[str, ...]
    feature_names: tuple[str, ...]
    labels: tuple[LabelVocabulary, ...] = ()

    def __post_init__(self) -> None:
        if len(self.feature_ids) != len(self.feature_names):
            raise ValueError(f"{len(self.feature_ids)} feature_ids but {len(self.feature_names)} feature_names")
        if len(set(self.feature_ids)) != len(self.feature_ids):
            raise ValueError("feature_ids must be unique")

    @property
    def n_genes(self) -> int:
        """Number of genes, g."""
        return len(self.feature_ids)

    @property
    def n_classes(self) -> dict[str, int]:
        """Number of classes of each label, without the null class."""
        return {label.name: len(label.classes) for label in self.labels}

    def label(self, name: str) -> LabelVocabulary:
        """Return the vocabulary of a label.

        Raises:
            UnknownNameError: The model has no such label.
        """
        for label in self.labels:
            if label.name == name:
                return label
        raise UnknownNameError(
            f"no label {name!r}; the model knows: {', '.join(x.name for x in self.labels) or 'none'}"
        )

    def extended(self, conditions: Iterable[Mapping[str, str | None]]) -> Vocabulary:
        """Return the vocabulary with the classes of a request that no cell of the data has; itself if there are none.

        Args:
            conditions: label -> class, as `LabelVocabulary.asked` returns it.
        """
        rows = list(conditions)
        labels = tuple(
            x if x.values is None else x.extended(c for row in rows if (c := row.get(x.name)) is not None)
            for x in self.labels
        )
        same = all(a is b for a, b in zip(labels, self.labels, strict=True))
        return self if same else replace(self, labels=labels)

    @property
    def values(self) -> dict[str, LabelValues]:
        """Meaning of the classes of labels that are values, by label."""
        return {x.name: x.values for x in self.labels if x.values is not None}

    def classes_of(self, given: Mapping[str, str], where: str) -> dict[str, str]:
        """Return the classes of some labels as the data call them: 1e1 is 10, and B+A is A+B in a label of sets.

        Args:
            given: Label -> name of a class.
            where: Setting that holds them, for messages.

        Raises:
            UnknownNameError: There is no such label or class; all are listed, each with its setting.
        """
        found, problems = {}, []
        for name, value in given.items():
            try:
                found[name] = self.label(name).class_of(value)
            except UnknownNameError as error:
                problems.append(f"{where}.{name}: {error}")
        if problems:
            raise UnknownNameError("\n".join(sorted(problems)))
        return found

    @cached_property
    def digest(self) -> str:
        """Return a hash of all names and their order."""
        return hashlib.sha256(self.to_json().encode()).hexdigest()

    def to_json(self) -> str:
        """Serialize the vocabulary, as in `vocabulary.json`."""
        typed = {x.name: x.type.to_json() for x in self.labels if x.type != TEXT}
        plain = {
            "feature_ids": self.feature_ids,
            "feature_names": self.feature_names,
            "labels": {x.name: x.measured for x in self.labels},
        }
        values = {x.name: x.values.to_json() for x in self.labels if x.values is not None}
        # Text and classes have no entry, so that vocabularies of them are those of 0.1.0, and so are their hashes.
        return json.dumps({**plain, **({"types": typed} if typed else {}), **({"values": values} if values else {})})

    @classmethod
    def from_json(cls, text: str, folder: Path | None = None) -> Vocabulary:
        """Parse the text that `to_json` returns.

        Args:
            folder: Of the file, where the vectors of labels are.
        """
        d = json.loads(text)
        types = {name: LabelType.from_json(plain) for name, plain in d.get("types", {}).items()}
        values = {name: _values(name, plain, folder) for name, plain in d.get("values", {}).items()}
        labels = tuple(
            LabelVocabulary(name, tuple(classes), types.get(name, TEXT), values.get(name))
            for name, classes in d["labels"].items()
        )
        return cls(tuple(d["feature_ids"]), tuple(d["feature_names"]), labels)

    def save(self, path: Path) -> None:
        """Write the vocabulary to a JSON file, and the vectors of its labels beside it."""
        save_tables(path.parent, {x.name: x.values.table for x in self.labels if isinstance(x.values, Vectors)})
        path.write_text(self.to_json())

    @classmethod
    def load(cls, path: Path) -> Vocabulary:
        """Read a vocabulary from a JSON file; the vectors of labels are read when they are needed."""
        return cls.from_json(path.read_text(), path.parent)


def _values(label: str, plain: dict[str, Any], folder: Path | None) -> LabelValues:
    table = None
    if plain["type"] == "vector":
        path = None if folder is None else folder.absolute() / FILE
        table = VectorTable(tuple(plain["names"]), plain["width"], plain["digest"], path, label)
    return values_from_json(label, plain, table)
