"""Can the texts of an HDF5 file be as long as it says? HDF5 takes its word, and that much memory, before it reads one.

A text of any length stands in its array as 16 bytes: its length, and in which heap of the file it lies. They are
read here as bytes, out of arrays that are stored in one piece, or in pieces that are plain or packed with gzip, as
anndata and pandas store them; other filters are not looked behind.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Iterator
from pathlib import Path

import h5py
import numpy as np

HEAP = struct.Struct("<4s4xQ")  # signature, version, size with this header
ELEMENT = np.dtype([("length", "<u4"), ("address", "<u8"), ("index", "<u4")])


def text_problem(data: h5py.Dataset) -> str | None:
    """What elements of variable length say that cannot be so: more bytes (or items) than the file has, a place that is
    no heap, or a heap that goes past the end of the file. None of other arrays.

    Raises:
        OSError, ValueError, zlib.error: of a damaged file.
    """
    if not h5py.check_vlen_dtype(data.dtype) and not _is_text(data.dtype):
        return None
    if data.file.userblock_size:  # places count from behind it; cells come in no such file
        return None
    path = Path(data.file.filename)
    most = path.stat().st_size
    with path.open("rb") as file:
        for part in _elements(data):
            part = part[part["length"] > 0]
            if (longest := int(np.max(part["length"], initial=0))) > most:
                return f"a text of {longest:,} bytes in a file of {most:,}"
            for address in map(int, np.unique(part["address"])):
                file.seek(min(address, most))
                magic, size = HEAP.unpack(file.read(HEAP.size).ljust(HEAP.size, b"\0"))
                if magic != b"GCOL":
                    return f"a text where the file holds none (at byte {address:,} of {most:,})"
                if address + size > most:
                    return f"a text in a part of {size:,} bytes of a file of {most:,}"
    return None


def _is_text(dtype: np.dtype) -> bool:
    info = h5py.check_string_dtype(dtype)
    return info is not None and info.length is None


def _elements(data: h5py.Dataset) -> Iterator[np.ndarray]:
    if data.chunks is None:
        if (offset := data.id.get_offset()) is not None:
            n = data.id.get_storage_size() // ELEMENT.itemsize
            yield np.fromfile(data.file.filename, ELEMENT, count=n, offset=offset)
        return
    properties = data.id.get_create_plist()
    filters = [properties.get_filter(i)[0] for i in range(properties.get_nfilters())]
    if filters not in ([], [h5py.h5z.FILTER_DEFLATE]):
        return
    for i in range(data.id.get_num_chunks()):
        left_out, raw = data.id.read_direct_chunk(data.id.get_chunk_info(i).chunk_offset)
        if filters and not left_out:
            raw = zlib.decompressobj().decompress(raw, max_length=ELEMENT.itemsize * int(np.prod(data.chunks)))
        yield np.frombuffer(raw[: len(raw) // ELEMENT.itemsize * ELEMENT.itemsize], ELEMENT)
