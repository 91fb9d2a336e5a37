"""What is fuzzed: readers of what strangers give us. Any answer is right but an error that is not ours."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from functools import cache
from pathlib import Path

import edits

from pipeline.config.io.loader import apply_overrides, read_raw, validate
from pipeline.config.job import H5adSource, TenxSource
from pipeline.data.inspection.examine import Question, examine
from pipeline.data.sources.h5ad import read_h5ad
from pipeline.data.sources.tenx import read_10x
from pipeline.data.tables import CellTables
from pipeline.data.validation.checks import checked
from scldm.errors import InputError

LABELS = ("cell_type",)


def config(data: bytes, folder: Path) -> None:
    """A job file; what follows a null byte is an override."""
    text, _, override = data.partition(b"\0")
    path = folder / "job.yaml"
    path.write_bytes(text)
    try:
        raw = read_raw(path)
        if override:
            apply_overrides(raw, [override.decode("utf-8", "replace")])
        validate(raw)
    except InputError as error:
        _says_something(error)


def h5ad(data: bytes, folder: Path) -> None:
    """Edits of a sound `.h5ad` file: looked at, and read as ingest reads it."""
    path = folder / "a.h5ad"
    path.write_bytes(edits.edited(sound_h5ad(), data))
    _looked_at(path)
    _ingested(lambda: read_h5ad(H5adSource(type="h5ad", path=str(path)), LABELS), LABELS)


def tenx(data: bytes, folder: Path) -> None:
    """Edits of a sound Cell Ranger file."""
    path = folder / "filtered.h5"
    path.write_bytes(edits.edited(sound_10x(), data))
    _looked_at(path)
    _ingested(lambda: read_10x(TenxSource(type="10x", path=str(path))), ())


def texts(data: bytes, folder: Path) -> None:
    """Matrix, features and barcodes of a Cell Ranger folder, with null bytes between them."""
    parts = [*data.split(b"\0"), b"", b""]
    for name, part in zip(("matrix.mtx", "features.tsv", "barcodes.tsv"), parts, strict=False):
        (folder / name).write_bytes(part)
    _looked_at(folder)
    _ingested(lambda: read_10x(TenxSource(type="10x", path=str(folder))), ())


TARGETS: dict[str, Callable[[bytes, Path], None]] = {"config": config, "h5ad": h5ad, "10x": tenx, "10x-texts": texts}


def run(name: str, data: bytes) -> None:
    """One input. Raises what a user would see as a traceback."""
    with tempfile.TemporaryDirectory(prefix="scldm-fuzz-", dir=_in_memory()) as folder:
        TARGETS[name](data, Path(folder))


def seeds(name: str) -> list[bytes]:
    """Inputs to begin with."""
    root = Path(__file__).resolve().parents[2]
    if name == "config":
        return [p.read_bytes() for p in sorted(root.glob("jobs/**/*.yaml"))]
    if name == "10x-texts":
        matrix = b"%%MatrixMarket matrix coordinate integer general\n2 3 3\n1 1 4\n2 2 1\n1 3 2\n"
        return [matrix + b"\0ENSG00000000001\tA\tGene Expression\nENSG00000000002\tB\tGene Expression\n\0a\nb\nc\n"]
    single = (bytes([kind, i, 3, 1, 4]) for kind in range(8) for i in (0, 5, 11, 17))
    return [b"", *single, bytes(range(64)), bytes(range(255, 0, -4))]


def _looked_at(path: Path) -> None:
    for found in examine(Question(str(path), labels=LABELS, profile=True)):
        assert all(c.isprintable() or c == "\n" for c in found.text())
        assert all(f.what and f.remedy for f in found.findings)


def _ingested(tables: Callable[[], CellTables], labels: tuple[str, ...]) -> None:
    try:
        for chunk in checked(tables(), labels, min_cells=1):
            assert chunk.nnz == 0 or chunk.data.min() >= 0
    except InputError as error:
        _says_something(error)


def _says_something(error: InputError) -> None:
    assert str(error).strip()


def _in_memory() -> str | None:
    return "/dev/shm" if Path("/dev/shm").is_dir() else None


# ---- sound files -------------------------------------------------------------------------------------------------
@cache
def sound_h5ad() -> bytes:
    import anndata as ad
    import numpy as np
    import pandas as pd
    import scipy.sparse as sp

    n, g = 36, 4
    x = sp.csr_matrix(np.random.default_rng(0).poisson(1, (n, g)).astype(np.float32) + np.eye(n, g, dtype=np.float32))
    obs = pd.DataFrame({"cell_type": pd.Categorical(["a", "b"] * 18), "age": np.arange(n)})
    obs.index = [f"c{i}" for i in range(n)]
    var = pd.DataFrame({"symbol": list("ABCD")}, index=[f"ENSG{i:011d}" for i in range(g)])
    with tempfile.TemporaryDirectory() as folder:
        ad.AnnData(x, obs=obs, var=var, layers={"umi": x.toarray()}).write_h5ad(Path(folder) / "a.h5ad")
        return (Path(folder) / "a.h5ad").read_bytes()


@cache
def sound_10x() -> bytes:
    import io

    import h5py
    import numpy as np

    n, g = 36, 4
    image = io.BytesIO()
    with h5py.File(image, "w") as f:
        m = f.create_group("matrix")
        m["barcodes"] = np.array([f"AAAC{i:04d}-1" for i in range(n)], "S")
        m["data"], m["indices"] = np.ones(n, np.int32), np.arange(n, dtype=np.int64) % g
        m["indptr"], m["shape"] = np.arange(n + 1, dtype=np.int64), np.array([g, n], np.int32)
        ids = [f"ENSG{i:011d}" for i in range(g)]
        columns = {"id": ids, "name": ids, "feature_type": ["Gene Expression"] * g, "genome": ["x"] * g}
        for name, values in columns.items():
            m[f"features/{name}"] = np.array(values, "S")
    return image.getvalue()
