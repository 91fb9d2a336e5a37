"""Reads tables that users write: conditions, held-out combinations, descriptions of cells.

Fields of a text file stay text, and only an empty field is missing: donor 001 and a class called NA stay what they are.
Nothing of a table is left aside: named levels of its index are columns, as after `value_counts()` or
`groupby().size()`, and an index of unnamed texts is refused.
"""

from __future__ import annotations

import re
from pathlib import Path

import pandas as pd

from scldm.data.class_names import class_names
from scldm.data.vocabulary import Vocabulary
from scldm.errors import InputError

N_CELLS = "n_cells"
COUNTED = ("count", "size")  # what pandas calls the column of `value_counts()` and `size()`
ENDINGS = (".csv", ".tsv", ".parquet")
_NUMBER = re.compile(r"-?(0|[1-9][0-9]{0,14})(\.[0-9]+)?")  # not 007, not 1e5, not an id of 20 digits


class TableError(InputError, ValueError):
    """Raised for a table that cannot be read as a whole. The message says which, why, and what to change."""


def read_table(path: Path, setting: str) -> pd.DataFrame:
    """Read a CSV, TSV or Parquet file.

    Args:
        setting: Setting that names the file, for messages.

    Raises:
        TableError: There is no such file, or not all of it can be read.
    """
    path = path.expanduser()
    if not path.is_file():
        raise TableError(f"{setting}: no file {path}; name a table that ends in {', '.join(ENDINGS)}")
    ending = path.suffix.lower()
    if ending not in ENDINGS:
        raise TableError(f"{setting}: {path}: the ending is {ending!r}; known: {', '.join(ENDINGS)}")
    try:
        if ending == ".parquet":
            table = pd.read_parquet(path)
        else:
            separator = "\t" if ending == ".tsv" else ","
            table = pd.read_csv(path, sep=separator, dtype=str, keep_default_na=False, na_values=[""])
    except (ValueError, OSError, pd.errors.ParserError) as error:  # UnicodeDecodeError is a ValueError
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise TableError(
            f"{setting}: {path} cannot be read: it is no readable CSV, TSV or Parquet table ({reason})"
        ) from error
    if ending != ".parquet" and not isinstance(table.index, pd.RangeIndex):
        # pandas takes the first fields as an index, which moves all others by a column.
        raise TableError(f"{setting}: {path}: rows have more fields than the header; name every column")
    return whole_table(table, f"{setting}: {path}")


def whole_table(table: pd.DataFrame | pd.Series, where: str, vocabulary: Vocabulary | None = None) -> pd.DataFrame:
    """Return a table with named index levels as columns and without an index.

    Args:
        table: A series is a column of numbers of cells, as `value_counts()` and `groupby().size()` return.
        vocabulary: Of the model that the table is for. An index without a name is then dropped if it cannot hold
            labels, as names of cells in a part of obs; without a vocabulary only row numbers are dropped.

    Raises:
        TableError: A part of the table has no name, or a name that another part has.
    """
    if isinstance(table, pd.Series):
        table = table.to_frame(N_CELLS if table.name is None or table.name in COUNTED else table.name)
    index = table.index
    named = [name for name in index.names if name is not None]
    problems = []
    for level in range(index.nlevels):
        values = index.get_level_values(level)
        if index.names[level] is None and _may_be_labels(values, table, vocabulary):
            problems.append(
                f"{where}: its index holds values without a name (first: {values[0]!r}); if they are labels, name it "
                "(table.rename_axis('cell_type')), else drop it (table.reset_index(drop=True))"
            )
    names = [str(name) for name in [*named, *table.columns]]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        problems.append(f"{where}: {', '.join(twice)} is there more than once (columns and index levels); keep one")
    if problems:
        raise TableError("\n".join(problems))
    levels = {str(name): index.get_level_values(name) for name in named}
    plain = table.reset_index(drop=True).set_axis([str(c) for c in table.columns], axis=1)
    for at, (name, values) in enumerate(levels.items()):
        plain.insert(at, name, pd.Series(values).reset_index(drop=True))
    return plain


def _may_be_labels(values: pd.Index, table: pd.DataFrame, vocabulary: Vocabulary | None) -> bool:
    """Return whether an index level without a name may be meant as a label; row numbers are not."""
    if not len(values) or (table.index.nlevels == 1 and pd.api.types.is_integer_dtype(values.dtype)):
        return False
    if vocabulary is None or not any(x.name in table.columns or x.name in table.index.names for x in vocabulary.labels):
        return True
    return bool({c for x in vocabulary.labels for c in x.classes} & set(class_names(values)))


def with_numbers(table: pd.DataFrame) -> pd.DataFrame:
    """Return a table of text with numbers and booleans where each text of a column is the plain notation of one.

    "007" and "1e5" may be names, so their columns stay text.
    """
    return table.apply(_parsed)


def _parsed(column: pd.Series) -> pd.Series:
    if column.dtype != object:
        return column
    texts = column.dropna()
    if not len(texts) or not texts.map(lambda x: isinstance(x, str)).all():
        return column
    if texts.isin(["True", "False"]).all() and len(texts) == len(column):
        return column == "True"
    return pd.to_numeric(column) if texts.str.fullmatch(_NUMBER).all() else column
