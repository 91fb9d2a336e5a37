"""Files that are damaged, hostile or something else: HDF5 that reaches outside itself, lies or was cut, odd paths."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from pathlib import Path

import anndata as ad
import h5py
import numpy as np
import scipy.sparse as sp

from helpers.files.fault_case import Case
from helpers.files.faulty_counts import edited
from helpers.files.foreign_files import Call
from helpers.files.h5ad_cases import G, N, counts, save


def swap(file, name, values):
    del file[name]
    file[name] = values


def far_indices(f):
    f["X/indices"][3] = 99


def negative_indices(f):
    f["X/indices"][3] = -1


def pointers_back(f):
    f["X/indptr"][3] = 100


def short_pointers(f):
    swap(f, "X/indptr", f["X/indptr"][:-1])


def short_data(f):
    swap(f, "X/data", f["X/data"][:-5])


def text_data(f):
    swap(f, "X/data", np.array([b"x"] * len(f["X/data"])))


def short_obs(f):
    for key in ("_index", "cell_type/codes"):
        swap(f, f"obs/{key}", f[f"obs/{key}"][:-1])


def short_column(f):
    swap(f, "obs/cell_type/codes", f["obs/cell_type/codes"][:-1])


def no_ids(f):
    del f["var/_index"]


def external_link(f):
    del f["X"]
    f["X"] = h5py.ExternalLink("/etc/passwd", "/")


def link_in_uns(f):
    f["uns/x"] = h5py.ExternalLink("other.h5", "/secret")


def soft_link(f):
    f["uns/x"] = h5py.SoftLink("/nowhere")


def virtual(f):
    layout = h5py.VirtualLayout((N, G), np.float32)
    layout[:] = h5py.VirtualSource("/tmp/other.h5", "x", (N, G))
    del f["X"]
    f.create_virtual_dataset("X", layout)


def stored_outside(f):
    del f["X"]
    f.create_dataset("X", (N, G), np.float32, external=[("/etc/passwd", 0, h5py.h5f.UNLIMITED)])


def bomb(f):
    f.create_dataset("uns/big", (1 << 40,), np.float32, chunks=(1 << 20,), compression="gzip")


def huge_shape(f):
    f["X"].attrs["shape"] = [1 << 40, G]


def deep(f):
    f.create_group("uns/" + "/".join("a" * 40))


HARMS: list[tuple[str, Callable[[h5py.File], None], str]] = [
    ("D:corrupt-h5", far_indices, "1 indices of X are outside its 6 (first: entry 3: index 99)"),
    ("D:corrupt-h5", negative_indices, "1 indices of X are outside its 6 (first: entry 3: index -1)"),
    ("D:corrupt-h5", pointers_back, "steps back"),
    ("D:corrupt-h5", short_pointers, "X/indptr has 40 entries, 41 are right"),
    ("D:corrupt-h5", short_data, "for 235 data and 240 indices"),
    ("D:corrupt-h5", text_data, "X is of the wrong type (data |S1"),
    ("D:corrupt-h5", short_obs, "lengths differ: obs and var are for 39 x 6, X is 40 x 6"),
    ("D:corrupt-h5", short_column, "1 columns of obs are not 40 long (first: cell_type: 39)"),
    ("D:corrupt-h5", no_ids, "var has no index of names"),
    ("D:external-link", external_link, "/X is a link to another file (/etc/passwd), which could be any file of yours"),
    ("D:external-link", link_in_uns, "/uns/x is a link to another file (other.h5)"),
    ("D:external-link", soft_link, "/uns/x is a soft link"),
    ("D:external-link", virtual, "/X is a virtual dataset"),
    ("D:external-link", stored_outside, "/X is stored in another file (/etc/passwd)"),
    ("D:huge-declared", bomb, "/uns/big declares 4096.0 GiB and stores 0 bytes"),
    ("D:huge-declared", huge_shape, "X declares 1,099,511,627,776 x 6"),
    ("D:huge-declared", deep, "groups deep; at most 16 are read"),
]
REFUSED_FOR = {"far_indices": "outside", "negative_indices": "outside"}  # seen while counts are read
HARMED = [
    Case(row, edited(harm), also=harm.__name__, says=(words,), refused=(REFUSED_FOR.get(harm.__name__, words),))
    for row, harm, words in HARMS
]


# ---- bytes -------------------------------------------------------------------------------------------------------
def cut(share: float) -> Callable[[Path], Path]:
    def make(folder: Path) -> Path:
        path = save(folder / "a.h5ad")
        path.write_bytes(path.read_bytes()[: int(path.stat().st_size * share)])
        return path

    return make


def begins(with_: bytes) -> Callable[[Path], Path]:
    """A whole file with other first bytes."""

    def make(folder: Path) -> Path:
        path = save(folder / "a.h5ad")
        path.write_bytes(with_ + path.read_bytes()[len(with_) :])
        return path

    return make


def holds(content: bytes, name: str = "a.h5ad") -> Callable[[Path], Path]:
    def make(folder: Path) -> Path:
        (folder / name).write_bytes(content)
        return folder / name

    return make


def long_text(**stored: object) -> Callable[[Path], Path]:
    """The first name in obs says that it is two billion bytes long. `stored`: how the names are stored."""

    def make(folder: Path) -> Path:
        path = save(folder / "a.h5ad")
        with h5py.File(path, "a") as f:
            names = f["obs/_index"][()]
            del f["obs/_index"]
            index = f["obs"].create_dataset("_index", data=names, dtype=h5py.string_dtype(), **stored)
            index.attrs["encoding-type"], index.attrs["encoding-version"] = "string-array", "0.2.0"
            at = index.id.get_offset() if index.chunks is None else index.id.get_chunk_info(0).byte_offset
        content = bytearray(path.read_bytes())
        content[at : at + 4] = (2_000_000_000).to_bytes(4, "little")
        path.write_bytes(content)
        return path

    return make


def long_heap(folder: Path) -> Path:
    """The heap of the texts says that it has a thousand times the bytes of the file."""
    path = save(folder / "a.h5ad")
    content = bytearray(path.read_bytes())
    at = content.index(b"GCOL") + 8
    content[at : at + 8] = (1000 * len(content)).to_bytes(8, "little")
    path.write_bytes(content)
    return path


LONG_HEAP = "the file is damaged (Can't synchronously read data"
LONG_TEXT = "/obs/_index has a text of 2,000,000,000 bytes in a file of"
DAMAGED = [
    Case("D:huge-declared", long_heap, also="heap", says=(LONG_HEAP,), refused=(LONG_HEAP,)),
    Case("D:huge-declared", long_text(), also="text", says=(LONG_TEXT,), refused=(LONG_TEXT,)),
    Case("D:huge-declared", long_text(chunks=(4,)), also="text in pieces", says=(LONG_TEXT,), refused=(LONG_TEXT,)),
    Case("D:corrupt-h5", cut(0.5), also="truncated", says=("the file is truncated", "copy or download it again"),
         refused=("the file is truncated",)),
    Case("D:corrupt-h5", begins(b"\x89HDX"), also="wrong-magic",
         says=("the file is not an HDF5 file; .h5ad files are written by adata.write_h5ad()",),
         refused=("is not an HDF5 file",)),
    Case("D:corrupt-h5", holds(b""), also="empty", says=("the file is empty",), refused=("the file is empty",)),
    Case("D:corrupt-h5", holds(b"hello"), also="text", says=("the file is not an HDF5 file",),
         refused=("is not an HDF5 file",)),
]  # fmt: skip


# ---- paths and other formats -------------------------------------------------------------------------------------
def folder_named_like_a_file(folder: Path) -> Path:
    (folder / "a.h5ad").mkdir()
    return folder / "a.h5ad"


def spaces_and_unicode(folder: Path) -> Path:
    (folder / "mes données").mkdir()
    return save(folder / "mes données" / "Zellen – 細胞 [1].h5ad")


def zarr(folder: Path) -> Path:
    """A store whose X a pickle unpacks: what the pickle would do is make a file, the canary."""
    store = folder / "a.zarr"
    ad.AnnData(sp.csr_matrix(counts())).write_zarr(store)
    meta = store / "X" / "data" / ".zarray"
    meta.write_text(meta.read_text().replace('"filters": null', '"filters": [{"id": "pickle", "protocol": 4}]'))
    harm = pickle.dumps(Call(open, str(folder / "canary"), "w"))
    (store / "X" / "data" / "0").write_bytes(harm)
    return store


def zarr_without_chunk(folder: Path) -> Path:
    store = folder / "a.zarr"
    ad.AnnData(sp.csr_matrix(counts())).write_zarr(store)
    (store / "X" / "data" / "0").unlink()
    return store


def left_by_macos(*names: str) -> Callable[[Path], Path]:
    """A folder with cells under the first name, and with what macOS writes beside files under the others."""

    def make(folder: Path) -> Path:
        save(folder / "made.h5ad").rename(folder / names[0])
        for name in names[1:]:
            (folder / name).write_bytes(b"\x00\x05\x16\x07\x00\x02\x00\x00Mac OS X")
        return folder

    return make


def hdf5(name: str, *places: str) -> Callable[[Path], Path]:
    """An HDF5 file of another kind."""

    def make(folder: Path) -> Path:
        with h5py.File(folder / name, "w") as file:
            for place in places:
                file.create_group(place)
        return folder / name

    return make


MACOS = ("what macOS wrote beside a file, without its content; name the file without the ._ before its name",)
ZARR_SAYS = ("this is a Zarr store, which is not read", "anndata.read_zarr(path).write_h5ad(...) if you trust it")
PLACES = [
    Case("D:path-spaces-unicode", spaces_and_unicode),
    Case("D:path-spaces-unicode", left_by_macos("a.h5ad", "._a.h5ad"), also="macos",
         says=("1 files are what macOS wrote beside other files (first: ._a.h5ad); they are skipped: delete them",),
         notes=("._a.h5ad: skipped, because macOS wrote it beside another file.",)),
    Case("D:path-spaces-unicode", left_by_macos("A.H5AD"), also="upper-case"),
    Case("D:other-format", lambda folder: left_by_macos("a.h5ad", "._a.h5ad")(folder) / "._a.h5ad", also="macos",
         says=MACOS, refused=MACOS),
    Case("D:other-format", hdf5("a.loom", "matrix", "row_attrs", "col_attrs"), also="loom",
         says=("the file is a Loom file; scanpy.read_loom(path).write_h5ad(...)",),
         refused=("the file is a Loom file; scanpy.read_loom(path).write_h5ad(...)",)),
    Case("D:other-format", hdf5("a.h5mu", "mod/rna/X", "obs", "var"), also="mudata",
         says=("a MuData file of several assays; mudata.read_h5mu(path)['rna'].write_h5ad(...)",),
         refused=("a MuData file of several assays; mudata.read_h5mu(path)['rna'].write_h5ad(...)",)),
    Case("D:other-format", hdf5("a.h5ad", "weights"), also="hdf5",
         says=("it has no obs and no var (it holds weights); name a file that adata.write_h5ad() wrote",),
         refused=("name a file that adata.write_h5ad() wrote",)),
    Case("D:directory-for-file", folder_named_like_a_file,
         says=("this folder holds no cells: no .h5ad, Cell Ranger output or SOMA experiment is in the folder (it "
               "holds nothing); name .h5ad files, a folder of them",),
         refused=("the folder holds no .h5ad file; it has nothing",)),
    Case("D:directory-for-file", lambda folder: folder / "none.h5ad", also="absent",
         says=("there is no such file, folder or pattern",),
         refused=("none.h5ad: no such file, folder or pattern",)),
    Case("D:zarr-pickle-codec", zarr, says=ZARR_SAYS, refused=ZARR_SAYS[:1]),
    Case("D:zarr-missing-chunk", zarr_without_chunk, says=ZARR_SAYS, refused=ZARR_SAYS[:1]),
    Case("D:other-format", holds(b"a,b\n1,2\n", "a.csv"), says=("the file is a table; make an AnnData of it",),
         refused=("the file is a table; make an AnnData of it",)),
    Case("D:other-format", holds(b"PK\x03\x04", "a.zip"), also="packed", says=("the file is packed; unpack it first",),
         refused=("the file is packed; unpack it first",)),
]  # fmt: skip

CASES = [*HARMED, *DAMAGED, *PLACES]
