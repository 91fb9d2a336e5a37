"""Labels whose classes are values (`ingest.label_values`): their texts in obs, and what the training cells fix of them.

All problems of all labels are reported together, before any count is read.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd

from pipeline.config.ingest import IngestConfig, LabelValue, NumberLabel, SetLabel, VectorLabel
from pipeline.data.ingest.held_out import Combination
from scldm.data.labels.read_vectors import read_named_vectors
from scldm.data.labels.values import (
    LabelValues,
    Number,
    Sets,
    ValueTextError,
    Vectors,
    number_key,
    number_text,
    set_text,
)
from scldm.data.labels.vectors import NamedVectors, fit_vectors
from scldm.errors import InputError

NAME = "name"  # column of names in a table of vectors, if it is not the first
SHOWN = 8  # values in a message


def read_tables(config: IngestConfig) -> dict[str, NamedVectors]:
    """Read the tables of vectors of all labels.

    Raises:
        InputError: Some cannot be used; all problems are listed.
    """
    found, problems = {}, []
    for label, given in config.label_values.items():
        if isinstance(given, VectorLabel):
            try:
                found[label] = read_named_vectors(Path(given.embeddings), f"{_setting(label)}.embeddings", column=NAME)
            except InputError as error:
                problems.append(str(error))
    if problems:
        raise InputError("\n".join(problems))
    return found


def with_values(config: IngestConfig, cells: pd.DataFrame, tables: Mapping[str, NamedVectors]) -> pd.DataFrame:
    """Return cells whose labels of values have one text for each value: 1e1 is 10, and B+A is A+B.

    Args:
        cells: Categorical columns of names of classes, none missing.

    Raises:
        InputError: Some names are no values; all of them are counted.
    """
    problems: list[str] = []
    for label, given in config.label_values.items():
        counts = cells[label].value_counts()
        classes = [str(c) for c in cells[label].cat.categories if counts[c]]
        texts = _texts(given, tables.get(label), classes)
        if bad := {c: text for c, text in texts.items() if isinstance(text, ValueTextError)}:
            problems.append(_refused(label, given, {c: int(counts[c]) for c in bad}, bad))
        else:
            names = cells[label].astype(object).map(texts)
            cells = cells.assign(**{label: pd.Categorical(names)})
    if problems:
        raise InputError("\n".join(problems))
    return cells


def canonical_combinations(config: IngestConfig, combinations: list[Combination]) -> list[Combination]:
    """Return held-out combinations whose values have the texts of `with_values`."""
    texts = {label: _reader(given) for label, given in config.label_values.items()}

    def text(label: str, name: str) -> str:
        try:
            return texts[label](name) if label in texts else name
        except ValueTextError:
            return name  # which no cell has: the caller says so

    return [replace(x, classes={k: text(k, v) for k, v in x.classes.items()}) for x in combinations]


def canonical_column(config: IngestConfig, label: str, names: pd.Series) -> pd.Series:
    """Return the texts of values of other cells than those of the source; None stays None.

    Raises:
        InputError: Some names are no values.
    """
    given = config.label_values.get(label)
    if given is None:
        return names
    read = _reader(given)
    try:
        texts = {name: read(name) for name in names.dropna().unique()}
    except ValueTextError as error:
        raise InputError(f"{_setting(label)}: old cells (ingest.replay) have {label}: {error}") from error
    return names.map(lambda name: texts.get(name) if name is not None else None).astype(object)


def fit_values(
    config: IngestConfig,
    classes: Mapping[str, Iterable[str]],
    trained: Mapping[str, Iterable[str]],
    tables: Mapping[str, NamedVectors],
) -> dict[str, LabelValues]:
    """Return what the training cells fix of each label: scales, members, features of vectors.

    Args:
        classes: All classes of the data, by label.
        trained: Classes with training cells.

    Raises:
        InputError: The training cells have too few values of a label.
    """
    found: dict[str, LabelValues] = {}
    problems = []
    for label, given in config.label_values.items():
        try:
            found[label] = _fitted(label, given, sorted(classes[label]), sorted(trained[label]), tables)
        except ValueError as error:
            problems.append(
                f"{_setting(label)}: {error}; leave the label out of ingest.label_values: it is classes then"
            )
    if problems:
        raise InputError("\n".join(problems))
    return found


def in_order(values: LabelValues | None, classes: Iterable[str]) -> tuple[str, ...]:
    """Return classes in the order of the vocabulary: numbers by value, others by name."""
    if isinstance(values, Number):
        return tuple(sorted(classes, key=lambda c: number_key(c, values.zero)))
    return tuple(sorted(classes))


def _fitted(
    label: str, given: LabelValue, classes: Sequence[str], trained: Sequence[str], tables: Mapping[str, NamedVectors]
) -> LabelValues:
    zero = tuple(given.zero)
    if isinstance(given, NumberLabel):
        return Number.fit(trained, unit=given.unit, scale=given.scale, zero=_numbers(zero))
    if isinstance(given, SetLabel):
        return Sets.fit(trained, classes, separator=given.separator, zero=zero)
    table = fit_vectors(label, tables[label], [c for c in trained if c not in zero])
    return Vectors(tuple(trained), table, zero)


def _numbers(zero: Sequence[str]) -> tuple[str, ...]:
    """Return names of the control, with the text of a number for those that are one."""
    return tuple(number_text(z, zero=()) if _is_number(z) else z for z in zero)


def _is_number(name: str) -> bool:
    try:
        number_text(name)
    except ValueTextError:
        return False
    return True


# ---- texts -------------------------------------------------------------------------------------------------------
def _reader(given: LabelValue, table: NamedVectors | None = None) -> Callable[[str], str]:
    """Return the function from a name to the text of its value, which raises ValueTextError."""
    if isinstance(given, NumberLabel):
        zero = _numbers(given.zero)
        return lambda name: number_text(name, scale=given.scale, zero=zero)
    if isinstance(given, SetLabel):
        return lambda name: set_text(name, separator=given.separator, zero=given.zero)
    if table is None:
        return lambda name: name.strip()
    known = {*table.names, *given.zero}

    def in_table(name: str) -> str:
        for text in (name, name.strip()):
            if text in known:
                return text
        raise ValueTextError(name)

    return in_table


def _texts(given: LabelValue, table: NamedVectors | None, classes: Sequence[str]) -> dict[str, str | ValueTextError]:
    read = _reader(given, table)
    found: dict[str, str | ValueTextError] = {}
    for name in classes:
        try:
            found[name] = read(name)
        except ValueTextError as error:
            found[name] = error
    return found


def _refused(label: str, given: LabelValue, counts: Mapping[str, int], errors: Mapping[str, ValueTextError]) -> str:
    """Return the message about classes that are no values, with the cells that have them and the way out."""
    names = sorted(counts, key=lambda c: -counts[c])
    listed = ", ".join(f"{name!r} ({counts[name]:,} cells)" for name in names[:SHOWN])
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    n, where = len(names), _setting(label)
    if isinstance(given, VectorLabel):
        return (
            f"{where}.embeddings: {given.embeddings} has no vector of {n} classes of {label}: {listed}{more}; add them "
            f"to the table, or, if they are the untreated control, set {where}.zero=[{names[0]}]"
        )
    if isinstance(given, SetLabel):
        return f"{where}: {n} classes of {label} are no sets: {listed}{more}; {errors[names[0]]}; set {where}.separator"
    flat = [name for name in names if _is_number(name)]
    if flat and len(flat) == n:
        return (
            f"{where}: {n} values of {label} have no logarithm: {listed}{more}; a value on a log scale is above 0: set "
            f"{where}.scale=linear, or, if they are the untreated control, {where}.zero=[{names[0]}]"
        )
    texts = [name for name in names if name not in flat]
    return (
        f"{where}: {label} is a number, and {n} of its values are none: {listed}{more}; {errors[texts[0]]}; write "
        f"numbers without a unit, leave the label out of ingest.label_values, or, if they are the untreated control, "
        f"set {where}.zero=[{texts[0]}]"
    )


def _setting(label: str) -> str:
    return f"ingest.label_values.{label}"


def values_facts(values: Mapping[str, LabelValues]) -> dict[str, object]:
    """Return the facts about labels of values, for the plan and the model card; none if there are no such labels."""
    about = {k: {"type": v.kind, "n_features": v.n_features, "summary": v.summary()} for k, v in values.items()}
    return {"label_values": about} if about else {}


def values_notes(values: LabelValues, label: str, unseen: Sequence[str]) -> list[str]:
    """Return notes on classes without training cells: what is known of them by their values."""
    notes = [note for name in unseen[:SHOWN] if (note := values.note(label, name)) is not None]
    return notes + ([f"{len(unseen) - SHOWN} more values of {label} have none."] if len(unseen) > SHOWN else [])


def has_training_cells(column: pd.Series, split: np.ndarray) -> set[str]:
    """Return the classes of a column that training cells have."""
    return {str(c) for c in column[split == "train"].unique()}
