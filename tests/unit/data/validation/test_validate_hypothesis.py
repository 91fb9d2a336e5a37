"""Whatever a file holds: an answer, never an exception; a valid file always passes; damage never passes unseen."""

from __future__ import annotations

import tempfile
import warnings
from pathlib import Path

import anndata as ad
import h5py
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pipeline.data.inspection.examine import Question, examine

# The same examples in every run; `make fuzz` is where new ones are looked for.
quick = settings(max_examples=25, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
pytestmark = pytest.mark.filterwarnings("ignore")
NAMES = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0/"), min_size=1, max_size=12)
LAYOUTS = st.sampled_from([np.asarray, sp.csr_matrix, sp.csc_matrix])
TYPES = st.sampled_from(["float32", "float64", "int32", "int64", "uint8", "uint16"])


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


@st.composite
def valid_cells(draw) -> ad.AnnData:
    """At least 20 cells of raw counts, with a label of two classes or more."""
    n, g = draw(st.integers(20, 60)), draw(st.integers(1, 12))
    rng = np.random.default_rng(draw(st.integers(0, 999)))
    x = rng.poisson(draw(st.floats(0.2, 3)), (n, g)) + np.eye(n, g, dtype=int)
    x[:, 0] += 1
    classes = draw(st.lists(NAMES.filter(str.strip), min_size=2, max_size=4, unique=True))
    good = [c for c in classes if c not in ("nan", "NaN", "None", "<NA>")] or ["a"]
    names = draw(st.lists(NAMES, min_size=n, max_size=n, unique=True))
    obs = pd.DataFrame({"cell_type": pd.Categorical([good[i % len(good)] for i in range(n)])}, index=names)
    var = pd.DataFrame(index=[f"ENSG{i:011d}" for i in range(g)])
    return ad.AnnData(draw(LAYOUTS)(x.astype(draw(TYPES))), obs=obs, var=var)


@st.composite
def odd_cells(draw) -> ad.AnnData:
    """Anything that anndata writes: any numbers, any names, any labels."""
    n, g = draw(st.integers(0, 30)), draw(st.integers(0, 6))
    number = st.one_of(st.just(0.0), st.integers(-3, 9).map(float), st.floats(width=32))
    values = draw(st.lists(number, min_size=n * g, max_size=n * g))
    x = np.array(values, np.float32).reshape(n, g)
    label = st.one_of(NAMES, st.none(), st.just("nan"), st.just("<script>"))
    kind = draw(st.sampled_from(["text", "category", "bool", "int", "float"]))
    labels = {
        "text": lambda: draw(st.lists(label.map(str), min_size=n, max_size=n)),  # anndata writes no None here
        "category": lambda: pd.Categorical(draw(st.lists(label, min_size=n, max_size=n))),
        "bool": lambda: draw(st.lists(st.booleans(), min_size=n, max_size=n)),
        "int": lambda: draw(st.lists(st.integers(-5, 5), min_size=n, max_size=n)),
        "float": lambda: draw(st.lists(st.floats(), min_size=n, max_size=n)),
    }[kind]()
    obs = pd.DataFrame({"cell_type": labels}, index=draw(st.lists(NAMES, min_size=n, max_size=n)))
    ids = st.one_of(NAMES, st.sampled_from(["ENSG00000000001", "ENSMUSG00000000001.2", "7"]))
    var = pd.DataFrame(index=draw(st.lists(ids, min_size=g, max_size=g)))
    if kind == "text":
        obs["cell_type"] = obs["cell_type"].astype(object)
    return ad.AnnData(draw(LAYOUTS)(x), obs=obs, var=var)


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
