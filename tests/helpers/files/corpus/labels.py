"""Labels of every type that an obs column can have."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import anndata as ad
import numpy as np
import pandas as pd

from helpers.files.corpus.case import CorpusCase, N, h5ad

DROP = {"missing_label": "drop"}


def repeated(values: Sequence[Any]) -> list[Any]:
    """Return the values again and again, one for each cell."""
    return [values[i % len(values)] for i in range(N)]


def label(values: Any, name: str = "cell_type") -> Callable:
    """Return a change that sets a label; a list is repeated."""

    def change(cells: ad.AnnData, rng: np.random.Generator) -> None:
        column = repeated(values) if isinstance(values, list) else values
        cells.obs[name] = pd.Series(column, index=cells.obs_names) if isinstance(column, list) else column

    return change


def typed(values: list[Any], dtype: str) -> Any:
    return pd.array(repeated(values), dtype=dtype)


WHOLE: dict[str, Any] = {  # a class for every cell
    "text": ["B", "T"],
    "strings": typed(["B", "T"], "string"),
    "categories": pd.Categorical(repeated(["B", "T"])),
    "categories, some unused": pd.Categorical(repeated(["B", "T"]), ["A", "B", "T", "Z"]),
    "categories in an order": pd.Categorical(repeated(["low", "high"]), ["low", "high"], ordered=True),
    "300 categories, two used": pd.Categorical(repeated(["k7", "k200"]), [f"k{i}" for i in range(300)]),
    "categories of whole numbers": pd.Categorical(repeated([3, 1, 2])),
    "categories of floats": pd.Categorical(repeated([0.5, 1.0, 10.0])),
    "categories of booleans": pd.Categorical(repeated([True, False])),
    "bool": [True, False],
    "nullable bool": typed([True, False], "boolean"),
    **{kind: typed([0, 1, 5], kind) for kind in ("int8", "uint8", "int32", "int64", "uint64", "Int64")},
    "large numbers": [2**53 + 1, 2**53 + 3],
    "negative numbers": [-1, 0, 1],
    "whole floats": [0.0, 1.0, 2.0],
    "doses": [0.1, 0.5, 1.0, 10.0],
    "doses of 32 bits": typed([0.1, 0.5, 1.0, 10.0], "float32"),
    "doses of 16 bits": typed([0.1, 0.5, 1.0], "float16"),
    "numbers as text": ["1", "2", "10"],
    "numbers as text with zeros": ["001", "002"],
    "NA is a class": ["NA", "B"],
    "None is a class": ["None", "B"],
    "words for nothing": ["NA", "N/A", "null", "none", "unknown"],
    "differ by case": ["T cell", "t cell", "T Cell"],
    "differ by white space": ["T", "T ", " T", "T\t"],
    "unicode": ["β-Zelle", "細胞", "e\u0301", "\u00e9"],
    "markup": ["<b>", "a&b", "\"q\"", "a'b", "a\\b"],
    "commas and lines": ["a,b", "a\nb", "a;b", "a\tb"],
    "like settings": ["true", "null", "~", "{x}", "1e5", "0x10", "=1+1"],
    "long": ["x" * 500, "y" * 500],
    "one class": ["B"],
    "a class for every cell": [f"k{i}" for i in range(N)],
    "a class of one cell": ["rare", *["B", "T"] * (N // 2)],
    "dates": ["2024-01-31", "2024-02-01"],
}  # fmt: skip
GAPS: dict[str, Any] = {  # some cells have no class
    "categories": pd.Categorical(repeated(["B", None, "T"])),
    "strings": typed(["B", None, "T"], "string"),
    "whole floats": [1.0, np.nan, 2.0],
    "nullable whole numbers": typed([1, None, 2], "Int64"),
    "nullable bool": typed([True, None, False], "boolean"),
    "the text nan": ["B", "nan", "T"],
    "the text <NA>": ["B", "<NA>", "T"],
    "empty texts": ["B", "", "T"],
}
NAMES = ["cell type", "Zelltyp-ß", "index", "split", "group", "label:cell_type", "dataset_id", "donor_id", "a.b", "1",
         "is_primary_data", "feature_id", "None", "obs_id"]  # fmt: skip


def two(cells: ad.AnnData, rng: np.random.Generator) -> None:
    cells.obs["dose"] = repeated([0.5, 1.0, 2.0, 4.0])


def with_index_of_that_name(cells: ad.AnnData, rng: np.random.Generator) -> None:
    """Name the index of obs as the label is named in the job."""
    cells.obs.index = pd.Index(cells.obs_names, name="donor")


CASES: list[CorpusCase] = [
    *(h5ad(f"label: {kind}", label(values)) for kind, values in WHOLE.items()),
    *(h5ad(f"label with gaps: {kind}", label(values), usable=False) for kind, values in GAPS.items()),
    *(h5ad(f"label with gaps, dropped: {kind}", label(values), config=DROP) for kind, values in GAPS.items()),
    h5ad("label: nan is a class", label(["B", "nan", "T"]), config={"missing_text": []}),
    h5ad("label: NA is missing", label(["B", "NA"]), config={"missing_text": ["NA"]}, usable=False),
    h5ad("label: NA is missing, dropped", label(["B", "NA", "T"]), config={"missing_text": ["NA"], **DROP}),
    h5ad("label: measurements", label(np.linspace(0.5, 9.7, N)), usable=False),
    h5ad("label: no value", label(pd.Categorical([None] * N, ["B", "T"])), usable=False),
    h5ad("label: no value, dropped", label(pd.Categorical([None] * N, ["B", "T"])), config=DROP, usable=False),
    h5ad("label: not there", labels=("celltype",), usable=False),
    h5ad("label: index of obs", with_index_of_that_name, labels=("donor",), usable=False),
    *(h5ad(f"label called {name!r}", label(["x", "y", "z"], name), labels=(name,)) for name in NAMES),
    *(h5ad(f"label called {name}", label(["x", "y"], name), labels=(name,), usable=False)
      for name in ("soma_joinid", "nnz", "raw_sum")),
    h5ad("label under another name", label(["x", "y"], "nnz"), labels=("my_nnz",),
         source={"columns": {"my_nnz": "nnz"}}),
    h5ad("two labels", two, labels=("cell_type", "dose")),
    h5ad("no label", labels=()),
]  # fmt: skip
