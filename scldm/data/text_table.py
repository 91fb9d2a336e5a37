"""Reads tables and lists of text as Excel, R and pandas write them.

A byte-order mark is no text. The separator is the one that the first line uses. White space around names and fields is
no part of them. Rows without any field are left out. Everything else that is uneven is an error with its line.
"""

from __future__ import annotations

import codecs
import csv
import io
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from scldm.errors import InputError
from scldm.text import shown

SEPARATORS = {",": "a comma", ";": "a semicolon", "\t": "a tab"}
UTF8, WIDE = codecs.BOM_UTF8, {
    codecs.BOM_UTF32_LE: "UTF-32", codecs.BOM_UTF32_BE: "UTF-32", codecs.BOM_UTF16_LE: "UTF-16",
    codecs.BOM_UTF16_BE: "UTF-16",
}  # fmt: skip
SAVE_AS_UTF8 = (
    "save it as UTF-8 (Excel: the file type 'CSV UTF-8'; R: fileEncoding = \"UTF-8\"; pandas writes UTF-8 by default)"
)


class TextTableError(InputError, ValueError):
    """Raised for a text that cannot be read as a table. The message says in which line, why, and what to change."""


@dataclass(frozen=True)
class TextTable:
    """Fields of a file, without white space around them."""

    header: list[str]
    rows: list[list[str]]  # as long as the header
    joined: list[str]  # fields that rows had with and without white space around them


class _Stripped(dict[str, str]):
    """Texts without white space around them; equal ones are kept once."""

    def __missing__(self, text: str) -> str:
        self[text] = text.strip()
        return self[text]

    def joined(self) -> list[str]:
        """Return the texts that came in several spellings."""
        return [text for text, n in Counter(self.values()).items() if n > 1 and text]


@dataclass(frozen=True)
class TextRows:
    """Rows of a file that have any field, without white space around fields."""

    rows: list[list[str]]
    lines: list[int]  # in which each row ends, from 1
    joined: list[str]


def read_text(path: Path) -> str:
    """Return the text of a file in UTF-8, with or without a byte-order mark.

    Raises:
        TextTableError: The file is in another encoding.
    """
    data = path.read_bytes()
    wide = next((name for mark, name in WIDE.items() if data.startswith(mark)), None)
    if wide is None and b"\0" in data[:1000]:
        wide = "UTF-16"
    if wide is not None:
        raise TextTableError(f"its encoding is {wide}, as of Excel's 'Unicode Text', or it is no text: {SAVE_AS_UTF8}")
    try:
        return data.removeprefix(UTF8).decode("utf-8")
    except UnicodeDecodeError as error:
        line = data[: error.start].count(b"\n") + 1
        near = " ".join(data[max(0, error.start - 15) : error.start + 15].decode("cp1252", "replace").split())
        raise TextTableError(
            f"its encoding is not UTF-8, probably Latin-1 or Windows-1252: line {line}, near {shown(near)!r}; "
            f"{SAVE_AS_UTF8}"
        ) from None


def read_rows(text: str, separator: str) -> TextRows:
    """Return the rows of a text.

    Raises:
        TextTableError: A quote is not closed.
    """
    known = _Stripped()
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=separator, strict=True, skipinitialspace=True)
    rows, lines = [], []
    try:
        for row in reader:
            fields = [known[x] for x in row]
            if any(fields):
                rows.append(fields)
                lines.append(reader.line_num)
    except csv.Error as error:
        raise TextTableError(
            f"line {reader.line_num}: {error}; a field in double quotes ends with a double quote, and one inside is "
            "written twice"
        ) from None
    return TextRows(rows, lines, known.joined())


def find_separator(text: str, ending: str) -> str:
    """Return the separator that the first line with text uses outside of quotes; a comma if it uses none.

    Args:
        ending: Of the file; that of a `.tsv` decides if the line has several.

    Raises:
        TextTableError: The line uses several.
    """
    first = next((line for line in text.splitlines() if line.strip().strip("".join(SEPARATORS))), "")
    bare = "".join(first.split('"')[::2])
    seen = [s for s in SEPARATORS if s in bare]
    if "\t" in seen and ending == ".tsv":
        return "\t"
    if len(seen) > 1:
        raise TextTableError(
            f"its header uses {' and '.join(SEPARATORS[s] for s in seen)}, so it is not clear what separates the "
            f"columns ({shown(first)!r}): use one, and put a name that holds another one in double quotes"
        )
    return seen[0] if seen else ","


def read_text_table(path: Path) -> TextTable:
    """Read a file whose first line with text is the header.

    Raises:
        TextTableError: It is in another encoding, has no header, or a row is longer or shorter than the header.
    """
    text = read_text(path)
    found = read_rows(text, find_separator(text, path.suffix.lower()))
    rows = found.rows
    if not rows:
        raise TextTableError("it is empty; the first line must name the columns")
    header, width = rows[0], len(rows[0])
    even = []
    for row, line in zip(rows[1:], found.lines[1:], strict=True):
        if len(row) > width and not any(row[width:]):
            row = row[:width]  # Excel writes fields of columns that were emptied
        if len(row) != width:
            raise _uneven(row, line, header)
        even.append(row)
    return TextTable(header, even, found.joined)


def _uneven(row: list[str], line: int, header: list[str]) -> TextTableError:
    what = f"line {line} has {len(row)} fields and the header {len(header)}"
    start = shown(", ".join(row))
    if len(row) < len(header):
        return TextTableError(f"{what} ({start}); write a separator for each empty field")
    return TextTableError(
        f"{what} ({start}): it has more fields than the header; name every column, and put a field that holds the "
        "separator in double quotes"
    )
