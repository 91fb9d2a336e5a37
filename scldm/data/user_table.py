"""Reads tables that users write: conditions, held-out combinations, descriptions of cells.

Fields of a text file stay text, and only an empty field is missing: donor 001 and a class called NA stay what they are.
`text_table.py` reads the files. Nothing of a table is left aside: named levels of its index are columns, as after
`value_counts()` or `groupby().size()`, and an index of unnamed texts is refused.
"""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pandas as pd

from scldm.data.class_names import class_names
from scldm.data.text_table import TextTableError, read_text_table
from scldm.data.vocabulary import Vocabulary
from scldm.errors import InputError
from scldm.text import shown

N_CELLS = "n_cells"
COUNTED = ("count", "size")  # what pandas calls the column of `value_counts()` and `size()`
ENDINGS = (".csv", ".tsv", ".parquet")
JOINED = "joined"  # in the attrs of a table: fields that rows had with and without white space around them
NAMELESS = ("", "Unnamed: 0")  # names of a column without one: in a file, and as pandas writes it again
_NUMBER = re.compile(r"-?(0|[1-9][0-9]{0,14})(\.[0-9]+)?")  # not 007, not 1e5, not an id of 20 digits


class TableError(InputError, ValueError):
    """Raised for a table that cannot be read as a whole. The message says which, why, and what to change."""


def read_table(path: Path, setting: str, *, first: str | None = None) -> pd.DataFrame:
    """Read a CSV, TSV or Parquet file.

    Args:
        setting: Setting that names the file, for messages.
        first: Column that a first column or an index without a name is, unless the table has one of that name; None
            refuses one, except row numbers.

    Returns:
        Its columns; `attrs["joined"]` lists the fields that only white space around them told apart.

    Raises:
        TableError: There is no such file, or not all of it can be read.
    """
    path = path.expanduser()
    if not path.is_file():
        raise TableError(f"{setting}: no file {path}; name a table that ends in {', '.join(ENDINGS)}")
    ending = path.suffix.lower()
    if ending not in ENDINGS:
        raise TableError(f"{setting}: {path}: the ending is {ending!r}; known: {', '.join(ENDINGS)}")
    where = f"{setting}: {path}"
    try:
        table = pd.read_parquet(path) if ending == ".parquet" else _text(path)
    except TextTableError as error:
        raise TableError(f"{where} cannot be read: {error}") from error
    except (ValueError, OSError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise TableError(f"{where} cannot be read: it is no readable CSV, TSV or Parquet table ({reason})") from error
    joined = table.attrs.get(JOINED, [])
    table = whole_table(_named(table, where, first), where)
    table.attrs[JOINED] = joined
    return table


def _text(path: Path) -> pd.DataFrame:
    """Return the fields of a file as text; an empty one is missing."""
    found = read_text_table(path)
    columns = [
        pd.Series([row[i] or np.nan for row in found.rows], dtype=object, name=name)
        for i, name in enumerate(found.header)
    ]
    table = pd.concat(columns, axis=1)
    table.attrs[JOINED] = found.joined
    return table


def _named(table: pd.DataFrame, where: str, first: str | None) -> pd.DataFrame:
    """Return a table whose columns and whose index of texts all have a name; row numbers are left out."""
    nameless = [i for i, name in enumerate(table.columns) if str(name) in NAMELESS]
    empty = [i for i in nameless if i and table.iloc[:, i].isna().all()]
    if others := [i + 1 for i in nameless if i and i not in empty]:
        raise TableError(f"{where}: column {others[0]} has no name; name it in the header")
    if 0 in nameless:
        values = table.iloc[:, 0]
        if _are_row_numbers(values):
            empty.append(0)
        elif first is None:
            raise TableError(
                f"{where}: the first column has no name (first value: {shown(values.iloc[0])!r}): name it, or write "
                "the table without its index (pandas: to_csv(index=False); R: write.csv(row.names = FALSE))"
            )
        else:
            table = table.set_index(table.columns[0]).rename_axis(None)
            empty = [i - 1 for i in empty]
    table = table.iloc[:, [i for i in range(table.shape[1]) if i not in empty]]
    if first is None or table.index.nlevels > 1 or table.index.name or pd.api.types.is_integer_dtype(table.index):
        return table
    return table.reset_index(drop=True) if first in table else table.rename_axis(first)


def _are_row_numbers(values: pd.Series) -> bool:
    """Return whether a column counts the rows, from 0 as pandas or from 1 as R."""
    texts, n = values.astype(str).tolist(), len(values)
    return any(texts == [str(i + start) for i in range(n)] for start in (0, 1))


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
