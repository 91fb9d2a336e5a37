"""Bytes read as a list of edits of a sound HDF5 file: what a fuzzer finds odd stays odd enough to open.

Bytes flipped at random hardly ever leave a file that opens. An edit removes or replaces a part of the tree, changes an
attribute, a value or a type, or overwrites bytes of the whole; every string of bytes is a list of edits.
"""

from __future__ import annotations

import contextlib
import io

import h5py
import numpy as np

MOST_EDITS = 12
JUNK = (
    lambda r: np.zeros(0),
    lambda r: np.arange(r.below(50)),
    lambda r: -np.arange(r.below(300), dtype=np.int8),
    lambda r: np.full((r.below(9), r.below(9)), r.number(), np.float64),
    lambda r: np.full(r.below(300), r.number(), np.float32),
    lambda r: np.array([b"x", b"\xff\xfe", b""], "S2"),
    lambda r: np.array(["", "nan", "\x1b[2J<b>"] * r.below(15), dtype=h5py.string_dtype()),
    lambda r: np.void(b"\x80\x04K\x01."),
    lambda r: "text",
    lambda r: r.number(),
    lambda r: h5py.Empty("f4"),
    lambda r: np.array([True, False] * r.below(25)),
    lambda r: np.zeros(3, [("a", "i4"), ("b", "f8")]),
    lambda r: np.full(r.below(300), 1 << 62, np.int64),
    lambda r: np.full(r.below(300), 3 + 4j),
)
NUMBERS = (0, 1, -1, 0.5, float("nan"), float("inf"), 1 << 25, 1 << 40, -(1 << 31), 1e300, 2)
REFUSALS = (
    OSError,
    LookupError,
    ValueError,
    TypeError,
    RuntimeError,
    AttributeError,
    ArithmeticError,
)  # of h5py, numpy
ATTRIBUTES = ("encoding-type", "encoding-version", "shape", "_index", "column-order", "ordered", "h5sparse_format")
VALUES = (
    "csr_matrix",
    "csc_matrix",
    "array",
    "dataframe",
    "categorical",
    "nullable-integer",
    "string-array",
    "",
    "x/y",
)


class Reader:
    """Numbers out of bytes; zeros when they are used up."""

    def __init__(self, data: bytes):
        self.data, self.at = data, 0

    @property
    def done(self) -> bool:
        return self.at >= len(self.data)

    def below(self, n: int) -> int:
        width = 1 if n <= 256 else 4
        part = self.data[self.at : self.at + width]
        self.at += width
        return int.from_bytes(part, "little") % max(1, n)

    def number(self) -> float:
        return NUMBERS[self.below(len(NUMBERS))]


def edited(sound: bytes, program: bytes) -> bytes:
    """The file after all edits of a program."""
    read, raw = Reader(program), []
    image = io.BytesIO(sound)
    with h5py.File(image, "r+") as file:
        for _ in range(MOST_EDITS):
            if read.done:
                break
            if (kind := read.below(8)) == 7:
                raw.append((read.below(1 << 20), read.below(256)))
            else:
                with contextlib.suppress(*REFUSALS):
                    _edit(file, kind, read)
    whole = bytearray(image.getvalue())
    for at, value in raw:
        whole[at % len(whole)] = value
    return bytes(whole)


def _edit(file: h5py.File, kind: int, read: Reader) -> None:
    names: list[str] = []
    file.visit(names.append)
    name = names[read.below(len(names))]
    node = file[name]
    if kind == 0:
        del file[name]
    elif kind == 1:
        del file[name]
        file[name] = JUNK[read.below(len(JUNK))](read)
    elif kind == 2:
        node.attrs[ATTRIBUTES[read.below(len(ATTRIBUTES))]] = VALUES[read.below(len(VALUES))]
    elif kind == 3:
        node.attrs[ATTRIBUTES[read.below(len(ATTRIBUTES))]] = JUNK[read.below(len(JUNK))](read)
    elif kind == 4:
        other = names[read.below(len(names))]
        file[f"{name}_again"] = file[other]  # a hard link, perhaps to what holds it
    elif kind == 5 and isinstance(node, h5py.Dataset) and node.size:
        values = node[...]
        values.ravel()[read.below(node.size)] = read.number()
        node[...] = values
    elif kind == 6:
        target = ("/etc/passwd", "/", "", "other.h5")[read.below(4)]
        del file[name]
        file[name] = (h5py.ExternalLink(target, "/"), h5py.SoftLink(f"/{target}"))[read.below(2)]
