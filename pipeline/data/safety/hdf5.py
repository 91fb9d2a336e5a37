"""Checks that an untrusted HDF5 file is safe to open, before any reader follows what it declares.

Refused: links, external storage and virtual datasets that reach outside the file (they can read any file that the user
can read), arrays that declare far more than the file holds, filters that are not installed (HDF5 would load a plug-in).
Only structure is read here; nothing in a file is ever unpickled.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import h5py

from pipeline.data.findings import Finding, error, warning
from pipeline.data.safety.formats import other_format
from pipeline.data.safety.hdf5_strings import text_problem
from pipeline.data.safety.memory_limit import memory_limit

MAX_OBJECTS = 100_000
MAX_LEVELS = 16
LARGEST_CHUNK = 1 << 30  # bytes; HDF5 reads a chunk into memory whole
LARGEST_TABLE = 8 << 30  # bytes of an array outside X, raw and layers: those are read whole
ATTRIBUTES = 1 << 28  # bytes of memory for the attributes of an object
BOMB = 1 << 28, 1200  # declared bytes, and declared per stored byte; gzip reaches at most about 1,030
COUNTS = ("X", "raw", "raw.X", "layers", "matrix")


def open_problems(path: Path) -> list[Finding]:
    """Return why a path cannot be opened as HDF5, if so."""
    if not path.exists():
        return [error("there is no such file", "check the path")]
    if path.is_dir():
        known = other_format(path)
        what, _, fix = (known or "a folder, and not a file with cells").partition(": ")
        return [error(f"this is {what}", fix or "name a file, or a pattern such as folder/*.h5ad")]
    if not h5py.is_hdf5(path):
        known = other_format(path)
        head = "empty" if not path.stat().st_size else "not an HDF5 file"
        message = f"the file is {known.partition(': ')[0] if known else head}"
        fix = ".h5ad files are written by adata.write_h5ad(); copy or download it again"
        return [error(message, known.partition(": ")[2] if known else fix)]
    try:
        h5py.File(path).close()
    except OSError as problem:
        words = "truncated" if "truncated" in str(problem) else "damaged"
        return [error(f"the file is {words} ({_line(problem)})", "copy or download it again, and compare its size")]
    return []


def unsafe(file: h5py.File) -> list[Finding]:
    """Return what in a file must not be followed or loaded; after an error nothing more may be read."""
    findings: list[Finding] = []
    try:
        _read_attributes(file)
        for n, (name, item) in enumerate(_walk(file["/"], "", set(), 0)):
            if n >= MAX_OBJECTS:
                findings.append(
                    error(f"the file holds more than {MAX_OBJECTS:,} objects", "leave out what is not cells")
                )
                break
            if isinstance(item, Finding):
                findings.append(item)
                continue
            if isinstance(item, h5py.Dataset):
                findings += _dataset(name, item)
            _read_attributes(item)
    except (OSError, RuntimeError, KeyError, ValueError, TypeError, MemoryError, zlib.error) as problem:
        findings.append(error(f"the file is damaged ({_line(problem)})", "copy or download it again"))
    return findings


def _read_attributes(item: h5py.Group | h5py.Dataset) -> None:
    """Read the attributes as any reader would, under a memory limit: HDF5 allocates whatever length a text declares."""
    with memory_limit(ATTRIBUTES):
        _ = dict(item.attrs)


def _walk(group: h5py.Group, at: str, seen: set[Any], level: int) -> Iterator[tuple[str, Any]]:
    """Yield all objects by their hard links, and a Finding in place of each link that is not followed."""
    for key in group:
        name = f"{at}/{key}"
        link = group.get(key, getlink=True)
        if isinstance(link, h5py.ExternalLink):
            yield name, _outside(f"{name} is a link to another file ({link.filename})")
            continue
        if isinstance(link, h5py.SoftLink):
            yield name, error(f"{name} is a soft link", "store the data itself: read the file with anndata and save it")
            continue
        item = group[key]
        info = h5py.h5o.get_info(item.id)
        if (key_of := (info.fileno, info.addr)) in seen:
            continue
        seen.add(key_of)
        yield name, item
        if isinstance(item, h5py.Group):
            if level >= MAX_LEVELS:
                yield name, error(f"{name} lies {level} groups deep", f"at most {MAX_LEVELS} are read")
                continue
            yield from _walk(item, name, seen, level + 1)


def _outside(what: str) -> Finding:
    return error(f"{what}, which could be any file of yours", "a file must hold its own data: ask for one that does")


def _dataset(name: str, data: h5py.Dataset) -> Iterator[Finding]:
    if data.is_virtual:
        yield _outside(f"{name} is a virtual dataset")
        return
    if data.external:
        yield _outside(f"{name} is stored in another file ({data.external[0][0]})")
        return
    plist = data.id.get_create_plist()
    for code in (plist.get_filter(i)[0] for i in range(plist.get_nfilters())):
        if not h5py.h5z.filter_avail(code):
            yield error(f"{name} is packed with HDF5 filter {code}, which is not installed", "save it with gzip")
    declared, stored = data.size * data.dtype.itemsize if data.shape is not None else 0, data.id.get_storage_size()
    size = f"{name} declares {declared / 2**30:.1f} GiB"
    if declared > BOMB[0] and declared > BOMB[1] * max(1, stored):
        yield error(f"{size} and stores {stored:,} bytes", "no real counts pack so well; do not open this file")
    elif declared > LARGEST_TABLE and name.split("/")[1] not in COUNTS:
        yield error(f"{size}, at most {LARGEST_TABLE >> 30} are read outside X", f"leave {name} out of the file")
    if data.chunks and _product(data.chunks) * data.dtype.itemsize > LARGEST_CHUNK:
        yield error(
            f"{name} is stored in chunks of {data.chunks}", f"rechunk it; at most {LARGEST_CHUNK >> 20} MiB each"
        )
    if (problem := text_problem(data)) is not None:
        yield error(f"{name} has {problem}", "copy or download it again")
    if data.dtype.kind == "V" and data.dtype.names is None:
        yield warning(f"{name} holds opaque bytes (a pickle?)", "they are never unpickled; leave them out")


def _product(chunks: tuple[int, ...]) -> int:
    total = 1
    for n in chunks:
        total *= n
    return total


def _line(problem: BaseException) -> str:
    return (str(problem).splitlines() or [type(problem).__name__])[0][:160]
