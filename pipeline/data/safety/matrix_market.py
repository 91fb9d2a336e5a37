"""Reads untrusted Matrix Market text with scipy, safely.

scipy 1.17 reads past the end of a file whose last line has no newline and does not end in a digit, which kills the
process, and it reads `2x` as 2. So the text is checked on its way to scipy: characters that no number has are an error,
and a last line without a newline gets one.
"""

from __future__ import annotations

import gzip
from io import BufferedIOBase
from pathlib import Path
from typing import Any

import scipy.io

SHORTEST_ENTRY = 2  # bytes of a line: a digit and a newline
GZIP_RATIO = 1032  # the largest compression ratio of gzip
LONGEST_LINE, MAX_COMMENTS = 1 << 16, 1000
NUMBERS = b"0123456789+-.eE \t\r\nnaifNAIF"


class CheckedText:
    """A stream for scipy: the header, the size line, then numbers only."""

    def __init__(self, file: BufferedIOBase):
        self.file, self.problem = file, ""
        self.head = line = file.readline(LONGEST_LINE)  # the header: type and layout
        for _ in range(MAX_COMMENTS):
            line = file.readline(LONGEST_LINE)
            if not line.startswith(b"%"):
                break
        self.head += line  # the size line; comments, which may be in any script, are left out
        if not self.head.isascii():
            raise ValueError("its header is not ASCII text")
        self.last = self.head[-1:]

    def read(self, size: int = -1) -> bytes:
        if self.head:
            head, self.head = self.head, b""
            return head
        data = self.file.read(size)
        if odd := data.translate(None, NUMBERS):
            self.problem = f"it holds {odd[:10]!r} where numbers should be"
            return b""
        if not data and self.last != b"\n":
            data = b"\n"
        self.last = data[-1:]
        return data


def read_matrix(path: Path, shape: tuple[int, int]) -> Any:
    """Read the whole matrix, which must have the given shape.

    Raises:
        ShapeError: it has another shape.
        ValueError, OSError, EOFError, MemoryError: the file is damaged.
    """
    packed = path.suffix == ".gz"
    with gzip.open(path) if packed else path.open("rb") as file:
        n_rows, n_columns, n_entries, _, field, _ = scipy.io.mminfo(CheckedText(file))
    if (n_rows, n_columns) != shape:
        raise ShapeError(n_rows, n_columns)
    most = path.stat().st_size * (GZIP_RATIO if packed else 1) // SHORTEST_ENTRY + 1
    if n_entries > most or field == "complex":
        raise ValueError(f"it declares {n_entries:,} {field} entries; in a file of its size are at most {most:,}")
    with gzip.open(path) if packed else path.open("rb") as file:
        checked = CheckedText(file)
        try:
            found = scipy.io.mmread(checked)
        except ValueError as error:
            raise ValueError(checked.problem or str(error)) from error
    if checked.problem:
        raise ValueError(checked.problem)
    return found


class ShapeError(ValueError):
    """The matrix does not belong to the features and cells."""

    def __init__(self, n_rows: int, n_columns: int):
        super().__init__(n_rows, n_columns)
        self.shape = f"{n_rows} x {n_columns}"
