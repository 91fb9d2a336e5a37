"""Opens the tables and the counts of an `.h5ad` file with anndata, and nothing else that is in the file.

anndata reads a file whole, or all but X: an array in obsm or uns that it does not know, or a layer larger than memory,
would keep cells from being read that need neither. So it is given a file of links: obs, the genes as `var` and the
counts as `X`, wherever they are. Validation and ingest open files only in this way, and agree on what can be read.
"""

from __future__ import annotations

import shutil
import tempfile
import weakref
from collections.abc import Collection
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import h5py

from pipeline.data.safety.h5ad_structure import matrix_path, var_path
from scldm.errors import InputError
from scldm.text import shown

UNREADABLE = "cannot be read and is left out"
NOT_UTF8 = " (its text is not UTF-8: decode it with the encoding it was written in, and write it again)"


@dataclass(frozen=True)
class H5adParts:
    """obs, genes and counts of a file.

    Attributes:
        path: The user's file.
        links: A file of links with the same content, readable as `.h5ad` as long as this object lives.
        adata: Opened from `links`, with X on disk; X is absent if the file has no counts in that place.
        notes: Columns that cannot be read and are left out.
    """

    path: Path
    links: Path
    adata: Any
    notes: list[str] = field(default_factory=list)


def open_parts(path: Path, layer: str | None) -> H5adParts:
    """Open a file whose structure was checked by `structure_problems`.

    Args:
        layer: As `ingest.source.layer`.

    Raises:
        InputError: anndata cannot read obs or var.
    """
    folder = Path(tempfile.mkdtemp(prefix="scldm-"))
    links = folder / path.name
    notes: list[str] = []
    try:
        try:
            _link(path, layer, links, {})
            adata = _open(links)
        except Exception:  # any: an untrusted file in another library's reader
            unreadable = _unreadable_columns(path, layer)
            if not any(unreadable.values()):
                raise
            links = folder / "readable" / path.name  # HDF5 may still hold the first file open
            links.parent.mkdir()
            _link(path, layer, links, unreadable)
            adata = _open(links)
            for table, columns in unreadable.items():
                notes += [f"{path.name}: column {shown(c)} of {table} {UNREADABLE}{why}" for c, why in columns.items()]
    except Exception as error:
        shutil.rmtree(folder, ignore_errors=True)
        line = (str(error).splitlines() or ["no message"])[0].replace(str(links), str(path))
        raise InputError(f"{path} cannot be read by anndata ({type(error).__name__}: {shown(line[:300])})") from error
    parts = H5adParts(path, links, adata, notes)
    weakref.finalize(parts, shutil.rmtree, folder, ignore_errors=True)
    return parts


def _open(links: Path) -> Any:
    import anndata

    return anndata.read_h5ad(links, backed="r")


def _link(path: Path, layer: str | None, links: Path, without: dict[str, dict[str, str]]) -> None:
    """Write the file of links.

    Args:
        without: Columns to leave out, by table.
    """
    source = str(path.absolute())
    with h5py.File(path) as file, h5py.File(links, "w") as out:
        for name, value in file.attrs.items():
            out.attrs[name] = value
        for name, place in (("obs", "obs"), ("var", var_path(file, layer)), ("X", matrix_path(file, layer))):
            if without.get(name):
                _link_columns(file[place], out.create_group(name), source, without[name])
            elif place in file:
                out[name] = h5py.ExternalLink(source, f"/{place}")
        if isinstance(file["obs"], h5py.Dataset) and isinstance(file.get("uns"), h5py.Group):
            out.create_group("uns")  # anndata before 0.7 kept the classes of categorical columns there
            for name in (n for n in file["uns"] if n.endswith("_categories")):
                out[f"uns/{name}"] = h5py.ExternalLink(source, f"/uns/{name}")


def _link_columns(table: h5py.Group, out: h5py.Group, source: str, without: Collection[str]) -> None:
    for name, value in table.attrs.items():
        out.attrs[name] = value
    out.attrs.create("column-order", [c for c in _columns(table) if c not in without], dtype=h5py.string_dtype())
    for name in (n for n in table if n not in without):
        out[name] = h5py.ExternalLink(source, f"{table.name}/{name}")


def _unreadable_columns(path: Path, layer: str | None) -> dict[str, dict[str, str]]:
    """Return the columns of obs and var that anndata cannot read, and why; the index is not one of them."""
    import anndata

    found: dict[str, dict[str, str]] = {}
    with h5py.File(path) as file:
        for name, place in (("obs", "obs"), ("var", var_path(file, layer))):
            table = file.get(place)
            for column in _columns(table) if isinstance(table, h5py.Group) else ():
                try:
                    anndata.io.read_elem(table[column])
                except Exception as error:  # any: as above
                    found.setdefault(name, {})[column] = NOT_UTF8 if _is_of_text(error) else ""
    return found


def _is_of_text(error: BaseException) -> bool:
    """Whether bytes could not be decoded; anndata and numpy wrap the error, or write it into their own."""
    return isinstance(error, UnicodeDecodeError) or "codec can't decode" in str(error)


def _columns(table: h5py.Group) -> list[str]:
    return [str(c) for c in table.attrs.get("column-order", ())]
