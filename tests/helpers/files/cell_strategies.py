"""Hypothesis strategies of cells: what anndata writes, usable or not."""

from __future__ import annotations

import anndata as ad
import numpy as np
import pandas as pd
import scipy.sparse as sp
from hypothesis import strategies as st

NAMES = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0/"), min_size=1, max_size=12)
LAYOUTS = st.sampled_from([np.asarray, sp.csr_matrix, sp.csc_matrix])
TYPES = st.sampled_from(["float32", "float64", "int32", "int64", "uint8", "uint16"])


@st.composite
def valid_cells(draw) -> ad.AnnData:
    """At least 30 cells of raw counts, with a label of two classes or more."""
    n, g = draw(st.integers(30, 60)), draw(st.integers(1, 12))
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
