"""Are the texts of an HDF5 file as long as they say? HDF5 takes their word and that much memory before it reads one.

A text of any length stands in its array as 16 bytes: its length, and where in the file it lies. They are read here as
bytes, out of arrays that are stored in one piece or in pieces that are plain or packed with gzip, as anndata and pandas
store them; other filters are not looked behind.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator

import h5py
import numpy as np

ELEMENT = np.dtype([("length", "<u4"), ("address", "<u8"), ("index", "<u4")])


def longest_text(data: h5py.Dataset) -> int:
    """The most bytes (or items) that an element of variable length says it has; 0 for other arrays.

    Raises:
        OSError, ValueError, zlib.error: of a damaged file.
    """
    if not h5py.check_vlen_dtype(data.dtype) and not _is_text(data.dtype):
        return 0
    return max((int(np.max(part["length"], initial=0)) for part in _elements(data)), default=0)


def _is_text(dtype: np.dtype) -> bool:
    info = h5py.check_string_dtype(dtype)
    return info is not None and info.length is None


def _elements(data: h5py.Dataset) -> Iterator[np.ndarray]:
    if data.chunks is None:
        if (offset := data.id.get_offset()) is not None:
            n = data.id.get_storage_size() // ELEMENT.itemsize
            yield np.fromfile(data.file.filename, ELEMENT, count=n, offset=offset)
        return
    for i in range(data.id.get_num_chunks()):
        _, raw = data.id.read_direct_chunk(data.id.get_chunk_info(i).chunk_offset)
        if data.compression == "gzip":
            raw = zlib.decompressobj().decompress(raw, max_length=ELEMENT.itemsize * int(np.prod(data.chunks)))
        elif data.compression is not None:
            return
        yield np.frombuffer(raw[: len(raw) // ELEMENT.itemsize * ELEMENT.itemsize], ELEMENT)
