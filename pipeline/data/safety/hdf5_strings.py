"""Checks the declared lengths of variable-length strings in an HDF5 file: HDF5 allocates them before it reads any.

A variable-length string is stored in its array as 16 bytes: its length, and the heap of the file that holds it. They
are read here as raw bytes, from arrays that are contiguous, or chunked without a filter or with gzip, as anndata and
pandas store them; arrays with other filters are not checked.
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
    """Return why elements of variable length cannot be valid, or None.

    Problems are more bytes (or items) than the file has, an address that is no heap, or a heap that goes past the end
    of the file.

    Raises:
        OSError, ValueError, zlib.error: the file is damaged.
    """
    if not h5py.check_vlen_dtype(data.dtype) and not _is_text(data.dtype):
        return None
    if data.file.userblock_size:  # addresses count from its end; files of cells have none
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
