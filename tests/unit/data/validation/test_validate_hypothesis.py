"""Whatever a file holds: an answer, never an exception; a valid file always passes; damage never passes unseen."""

from __future__ import annotations

import tempfile
import warnings
from pathlib import Path

import anndata as ad
import h5py
import numpy as np
import pytest
import scipy.sparse as sp
from helpers.files.cell_strategies import odd_cells, valid_cells
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pipeline.data.inspection.examine import Question, examine

# The same examples in every run; `make fuzz` is where new ones are looked for.
quick = settings(max_examples=25, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
pytestmark = pytest.mark.filterwarnings("ignore")


def saved(a: ad.AnnData, folder: str) -> Path:
    path = Path(folder) / "a.h5ad"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        a.write_h5ad(path)
    return path


def answer(path: Path, *labels: str):
    [found] = examine(Question(str(path), labels=labels))
    assert found.text()
    assert all(f.remedy and f.what for f in found.findings)
    assert all(c.isprintable() or c == "\n" for c in found.text())
    return found


@quick
@given(valid_cells())
@pytest.mark.row("D:round-trip")
def test_valid_cells_always_pass(a):
    with tempfile.TemporaryDirectory() as folder:
        found = answer(saved(a, folder), "cell_type")
    assert found.errors == []
    assert found.facts["cells"] == a.n_obs


@quick
@given(odd_cells())
def test_odd_cells_always_get_an_answer(a):
    with tempfile.TemporaryDirectory() as folder:
        found = answer(saved(a, folder), "cell_type", "absent")
    x = np.asarray(a.X.todense() if sp.issparse(a.X) else a.X)
    counts_bad = [(~np.isfinite(x)).sum(), (x < 0).sum()]
    by_words = [sum(f.count for f in found.errors if w in f.what) for w in ("NaN or infinite", "are negative")]
    assert by_words == counts_bad


@settings(quick, max_examples=40)
@given(valid_cells(), st.data())
@pytest.mark.row("D:flipped-bytes")
def test_flipped_and_missing_bytes_never_raise(a, data):
    with tempfile.TemporaryDirectory() as folder:
        path = saved(a, folder)
        raw = bytearray(path.read_bytes())
        for _ in range(data.draw(st.integers(1, 8))):
            raw[data.draw(st.integers(0, len(raw) - 1))] = data.draw(st.integers(0, 255))
        path.write_bytes(raw[: data.draw(st.sampled_from([len(raw), len(raw) - 1, len(raw) // 2]))])
        answer(path, "cell_type")


@quick
@given(valid_cells(), st.data())
def test_any_array_may_be_replaced_or_missing(a, data):
    with tempfile.TemporaryDirectory() as folder:
        path = saved(a, folder)
        with h5py.File(path, "a") as f:
            nodes: list[str] = []
            f.visit(nodes.append)
            name = data.draw(st.sampled_from(sorted(nodes)))
            del f[name]
            junk = data.draw(st.sampled_from([None, 3, np.zeros(0), np.arange(5), np.zeros((2, 2, 2)), "text",
                                              b"\x80\x04", np.full(7, -9), np.array(["a"] * 9, object)]))  # fmt: skip
            if junk is not None:
                f[name] = junk
        found = answer(path, "cell_type")
    if name.split("/")[0] in ("X", "obs", "var") and not name.endswith("categories"):  # other classes are classes too
        assert found.findings, f"{name} := {junk!r}"
