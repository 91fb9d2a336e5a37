"""Matrix Market text of a stranger, made safe for scipy's reader.

scipy 1.17 reads past the end of a file whose last line has no end and does not end in a digit, which kills the process,
and takes `2x` for 2. So the numbers are looked at on their way: other characters are an error, a last line gets an end.
"""

from __future__ import annotations

import gzip
from pathlib import Path
from typing import Any

import scipy.io

SHORTEST_ENTRY = 2  # bytes of a line: a digit and its end
GZIP_RATIO = 1032  # gzip packs no better
LONGEST_LINE, MOST_COMMENTS = 1 << 16, 1000
NUMBERS = b"0123456789+-.eE \t\r\nnaifNAIF"


class Checked:
    """A stream for scipy: what the matrix is, its size, then numbers only."""

    def __init__(self, file: Any):
        self.file, self.problem = file, ""
        self.head = line = file.readline(LONGEST_LINE)  # what it is
        for _ in range(MOST_COMMENTS):
            line = file.readline(LONGEST_LINE)
            if not line.startswith(b"%"):
                break
        self.head += line  # the size; comments, which may be in any script, are left out
        if not self.head.isascii():
            raise ValueError("its head is not ASCII text")
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
    """The whole matrix, which must have this shape. Raises ValueError, OSError, EOFError or MemoryError."""
    packed = path.suffix == ".gz"
    with gzip.open(path) if packed else path.open("rb") as file:
        n_rows, n_columns, n_entries, _, field, _ = scipy.io.mminfo(Checked(file))
    if (n_rows, n_columns) != shape:
        raise ShapeError(n_rows, n_columns)
    most = path.stat().st_size * (GZIP_RATIO if packed else 1) // SHORTEST_ENTRY + 1
    if n_entries > most or field == "complex":
        raise ValueError(f"it declares {n_entries:,} {field} entries; in a file of its size are at most {most:,}")
    with gzip.open(path) if packed else path.open("rb") as file:
        checked = Checked(file)
        try:
            found = scipy.io.mmread(checked)
        except ValueError as error:
            raise ValueError(checked.problem or str(error)) from error
    if checked.problem:
        raise ValueError(checked.problem)
    return found


class ShapeError(ValueError):
    """The matrix is of other features or cells."""

    def __init__(self, n_rows: int, n_columns: int):
        super().__init__(n_rows, n_columns)
        self.shape = f"{n_rows} x {n_columns}"
