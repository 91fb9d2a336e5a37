"""Which files a source of cells is made of: the readers open these, and the version of a stage holds their content.

Only names are looked at here, so that `scldm plan` needs none of the libraries that read the files.
"""

from __future__ import annotations

import glob
import shlex
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

MATRIX, BARCODES, FEATURES = ("matrix.mtx",), ("barcodes.tsv",), ("features.tsv", "genes.tsv")
_WRITES = ("__fragments", "__commits", "__schema")  # folders of a TileDB array that grow by a name with every write


# ---- h5ad --------------------------------------------------------------------------------------------------------
def h5ad_files(path: str) -> list[Path]:
    """Return the `.h5ad` files that a path, folder or glob pattern stands for, sorted; what macOS left is skipped."""
    p = Path(path).expanduser()
    if p.is_dir():
        return sorted(x for x in p.iterdir() if is_h5ad(x) and not is_left_by_macos(x))
    if p.exists():
        return [p]
    return sorted(x for x in map(Path, glob.glob(str(p))) if not is_left_by_macos(x))


def is_h5ad(path: Path) -> bool:
    """Whether a path is named as an `.h5ad` file, in any case of letters."""
    return path.suffix.lower() == ".h5ad"


def is_left_by_macos(path: Path) -> bool:
    """Whether a path is named as what macOS writes beside a file on a foreign disk or in an archive, `._cells.h5ad`."""
    return path.name.startswith("._")


def left_by_macos(path: str) -> list[Path]:
    """Return the files in a folder that `h5ad_files` skips."""
    p = Path(path).expanduser()
    return sorted(x for x in p.iterdir() if is_h5ad(x) and is_left_by_macos(x)) if p.is_dir() else []


# ---- 10x ---------------------------------------------------------------------------------------------------------
def is_tenx(path: Path) -> bool:
    """Whether a path looks like an output: an .h5 file, or a folder with a matrix."""
    if path.is_file():
        return path.suffix.lower() in (".h5", ".hdf5") and not is_left_by_macos(path)
    return path.is_dir() and tenx_part(path, MATRIX) is not None


def tenx_part(folder: Path, names: tuple[str, ...]) -> Path | None:
    """Return the file of a Cell Ranger folder that has one of the names, gzipped or not; None if there is none."""
    return next((p for n in names for p in (folder / n, folder / f"{n}.gz") if p.is_file()), None)


def tenx_pairs(folder: Path) -> list[tuple[Path, Path]]:
    """Return the files of a Cell Ranger folder that are there twice, unpacked and gzipped."""
    names = [n for part in (MATRIX, FEATURES, BARCODES) for n in part]
    pairs = ((folder / n, folder / f"{n}.gz") for n in names)
    return [(plain, packed) for plain, packed in pairs if plain.is_file() and packed.is_file()]


def tenx_outputs(path: str) -> list[Path]:
    """Return all outputs that a path, folder or glob pattern stands for: of several genomes, all."""
    p = Path(path).expanduser()
    matches = [p] if p.exists() else sorted(map(Path, glob.glob(str(p))))
    inside = ([m] if is_tenx(m) or not m.is_dir() else sorted(m.iterdir()) for m in matches)
    return [output for found in inside for output in found if is_tenx(output)]


def tenx_files(output: Path) -> list[Path]:
    """Return the files that are read of an output."""
    if output.is_file():
        return [output]
    return [p for names in (MATRIX, FEATURES, BARCODES) if (p := tenx_part(output, names)) is not None]


def prefix_advice(folder: Path) -> str | None:
    """Return how to arrange files that GEO has renamed, `GSM…_matrix.mtx.gz`; None if the folder has none.

    They are not read as they are: which features belong to which matrix would be a guess.
    """
    if not folder.is_dir():
        return None
    found = sorted(p.name for p in folder.iterdir() if p.name.removesuffix(".gz").endswith(MATRIX) and p.is_file())
    if not found:
        return None
    command = (
        f'cd {shlex.quote(str(folder))} && for m in *matrix.mtx*; do p="${{m%matrix.mtx*}}"; mkdir -p "${{p%_}}"; '
        'for f in "$p"*; do [ -f "$f" ] && mv "$f" "${p%_}/${f#"$p"}"; done; done'
    )
    return (
        f"{len(found)} matrices have a prefix in their name ({found[0]}); give each sample a folder of its own, with "
        f"files named as Cell Ranger names them: {command}"
    )


# ---- SOMA --------------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Entry:
    """A name in a folder, local or in an object store, and when it last changed, in seconds since 1970."""

    name: str
    changed_at: float


def soma_writes(uri: str, measurement: str, layer: str, s3: Callable[[], Any]) -> dict[str, list[Entry]]:
    """Return the writes that make up each array of an experiment that is read; arrays that do not exist are left out.

    TileDB never changes a file: every write, deletion or new column adds a name with its time and a random part.

    Args:
        s3: Returns a pyarrow filesystem for an s3:// address.
    """
    remote = s3() if "://" in uri and not uri.startswith("file://") else None
    root = uri.split("://", 1)[-1].rstrip("/")

    def writes(array: str) -> list[Entry]:
        place = f"{root}/{array}"
        return list(_remote(remote, place) if remote is not None else _local(Path(place).expanduser()))

    def members(collection: str, wanted: str) -> list[str]:
        """Return the wanted member, or all if it is not there: ingest takes the only one."""
        names = _folders(remote, f"{root}/{collection}")
        return [wanted] if wanted in names else names

    arrays = ["obs", "datasets"]
    for name in members("ms", measurement):
        place = f"ms/{name}"
        layers = [f"{place}/X/{x}" for x in members(f"{place}/X", layer)]
        arrays += [f"{place}/var", *layers, f"{place}/feature_dataset_presence_matrix"]
    return {array: entries for array in arrays if (entries := writes(array))}


def _folders(remote: Any, place: str) -> list[str]:
    """Return the names of the members of a collection, sorted."""
    if remote is None:
        folder = Path(place).expanduser()
        names = [p.name for p in folder.iterdir() if p.is_dir()] if folder.is_dir() else []
    else:
        from pyarrow.fs import FileSelector

        names = [x.base_name for x in remote.get_file_info(FileSelector(place, allow_not_found=True))]
    return sorted(name for name in names if not name.startswith("__"))


def _local(array: Path) -> Iterator[Entry]:
    for name in ("", *_WRITES):  # before format 12, fragments lay beside the folders
        for p in sorted((array / name).glob("__*")):
            if _is_write(p.name):
                yield Entry(f"{name}/{p.name}", p.stat().st_ctime)


def _remote(filesystem: Any, array: str) -> Iterator[Entry]:
    from pyarrow.fs import FileSelector

    for name in ("", *_WRITES):
        place = f"{array}/{name}".rstrip("/")
        found = filesystem.get_file_info(FileSelector(place, allow_not_found=True))
        for info in sorted(found, key=lambda x: x.base_name):
            if _is_write(info.base_name):
                changed_at = info.mtime.timestamp() if info.mtime else _written_at(info.base_name)
                yield Entry(f"{name}/{info.base_name}", changed_at)


def _is_write(name: str) -> bool:
    """Whether a name is that of a write, which begins with its time, and not of a folder of TileDB's."""
    return name.startswith("__") and name[2:3].isdigit()


def _written_at(name: str) -> float:
    """Return the time in a TileDB name, `__<first ms>_<last ms>_<random>…`: S3 has none for what acts as a folder."""
    times = [int(x) for x in name.split("_")[2:4] if x.isdigit()]
    return max(times, default=0) / 1000
