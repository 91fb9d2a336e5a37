"""What a new user tries in a notebook, in a kernel: what happened, beside what should.

Each line runs in one Jupyter kernel, on a model that is trained and on the cells that it was trained on. A line `works`
if it gives a result, and is `refused` if it ends in one of our errors, whose first line is shown; another exception is
a fault of ours. Exits with 1 if a line did not do what it should.

    python benchmarks/notebook_things.py runs/first cells.h5ad --json benchmarks/results/notebook_things.json
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path

import nbformat
from harness import machine
from nbclient import NotebookClient

START = """
import anndata, numpy as np, pandas as pd, scanpy as sc, scipy.sparse as sp, warnings
warnings.simplefilter("ignore")
import scldm
from scldm.errors import InputError
model = scldm.load({model!r})
adata = anndata.read_h5ad({cells!r})
adata = adata[:, [x for x in adata.var_names if x in set(model.vocabulary.feature_ids)]].copy()
label = list(model.labels)[0]
a, b = model.labels[label][:2]
few = adata[:40].copy()
of_a = adata[adata.obs[label].astype(str) == a][:30].copy()
made = model.generate({{label: a}}, n=30, seed=0)
def tried(code):
    try:
        result = eval(code)
    except (InputError, TypeError) as error:
        return "refused", str(error).strip().splitlines()[0]
    except BaseException as error:
        return "fault", f"{{type(error).__name__}}: {{error}}"
    return "works", repr(getattr(result, "shape", result)).splitlines()[0]
"""
WORKS = {
    "several classes": "model.generate({label: [a, b]}, n=10)",
    "no condition": "model.generate(n=10)",
    "a table": "model.generate(pd.DataFrame({label: [a, b], 'n_cells': [3, 4]}))",
    "a list of dictionaries": "model.generate([{label: a, 'n_cells': 3}])",
    "a dictionary of lists": "model.generate({label: [a, b], 'n_cells': [3, 4]})",
    "the obs of real cells": "model.generate(adata.obs[[label]].iloc[:20])",
    "labels in index levels": "model.generate(per_class)",
    "a categorical": "model.generate({label: pd.Categorical([a, b])}, n=4)",
    "a numpy seed": "model.generate({label: a}, n=3, seed=np.int64(3))",
    "a numpy number of cells": "model.generate({label: a}, n=np.int32(3))",
    "a library size": "model.generate({label: a}, n=3, library_size=2000)",
    "some genes": "model.generate({label: a}, n=3, genes=list(model.vocabulary.feature_ids[:5]))",
    "real and generated in one object": "anndata.concat([model.align(few), made])",
    "a file and back": "(made.write_h5ad('made.h5ad'), anndata.read_h5ad('made.h5ad'))[1]",
    "sparse cells": "model.encode(few.copy())",
    "a view": "model.encode(adata[10:30])",
    "dense cells": "model.encode(anndata.AnnData(few.X.toarray(), few.obs, few.var))",
    "columns compressed": "model.encode(anndata.AnnData(sp.csc_matrix(few.X), few.obs, few.var))",
    "integers": "model.encode(anndata.AnnData(few.X.astype('int64'), few.obs, few.var))",
    "the path of a file": "model.encode(few_file)",
    "a backed file": "model.encode(anndata.read_h5ad(few_file, backed='r'))",
    "counts in raw": "model.encode(with_raw, layer='raw')",
    "counts in a layer": "model.encode(with_layer, layer='counts')",
    "a device by itself": "scldm.load(model_folder, device='auto')",
    "to a device": "model.to('cpu')",
    "reconstruct": "model.reconstruct(few)",
    "normalized_expression": "model.normalized_expression(few)",
    "perturb": "model.perturb(of_a, {label: b})",
    "transform": "model.transform(few, {label: b})",
    "differential_expression": "model.differential_expression(adata, groupby=label, group1=a, group2=b)",
    "interpolate": "model.interpolate(of_a[:1].copy(), few[-1:].copy(), n=3)",
    "map": "model.map(few, reference=adata)",
    "log_likelihood": "model.log_likelihood(few)",
    "score": "scldm.score(model.generate(adata.obs[[label]]), real=adata)",
    "history": "model.history",
    "report": "model.report()",
    "save_pretrained and from_pretrained": "scldm.Model.from_pretrained(model.save_pretrained('shared', force=True))",
}
REFUSED = {
    "a number alone": "model.generate(100)",
    "an unknown class": "model.generate({label: a + 'x'}, n=3)",
    "an unknown label": "model.generate({label + 's': a}, n=3)",
    "library_size='median'": "model.generate({label: a}, n=3, library_size='median')",
    "a negative seed": "model.generate({label: a}, n=3, seed=-1)",
    "normalised values": "model.encode(normalised)",
    "genes of another species": "model.encode(renamed)",
    "a file that is not there": "model.encode('nowhere.h5ad')",
    "a wrong device": "scldm.load(model_folder, device='gpu')",
    "an unknown argument": "model.generate({label: a}, n_cells=3)",
}
MORE = """
few_file, model_folder = "few.h5ad", {model!r}
few.write_h5ad(few_file)
per_class = adata.obs.groupby(label, observed=True).size().rename("n_cells").to_frame() // 9
with_raw = few.copy(); with_raw.raw = few; sc.pp.normalize_total(with_raw); sc.pp.log1p(with_raw)
with_layer = few.copy(); with_layer.layers["counts"] = few.X.copy(); sc.pp.normalize_total(with_layer)
normalised = few.copy(); sc.pp.normalize_total(normalised); sc.pp.log1p(normalised)
renamed = few.copy(); renamed.var_names = [f"other{{i}}" for i in range(few.n_vars)]
renamed.var = renamed.var[[]]
"""


def tried(model: Path, cells: Path) -> list[dict[str, str]]:
    """Run every line in one kernel; returns a row for each."""
    things = [("works", *x) for x in WORKS.items()] + [("refused", *x) for x in REFUSED.items()]
    where = {"model": str(model.resolve()), "cells": str(cells.resolve())}
    start = nbformat.v4.new_code_cell(START.format(**where) + MORE.format(**where))
    lines = [nbformat.v4.new_code_cell(f"print(*tried({code!r}), sep='\\n')") for _, _, code in things]
    notebook = nbformat.v4.new_notebook(cells=[start, *lines])
    with tempfile.TemporaryDirectory() as folder:
        NotebookClient(notebook, timeout=1800, resources={"metadata": {"path": folder}}).execute()
    rows = []
    for (expected, thing, code), cell in zip(things, notebook.cells[1:], strict=True):
        said = "".join(o.get("text", "") for o in cell.outputs if o.get("name") == "stdout").rstrip("\n")
        happened, _, what = said.rpartition("\n")[0].rpartition("\n")[2], "", said.rpartition("\n")[2]
        rows.append({"thing": thing, "code": code, "expected": expected, "happened": happened, "result": what})
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, help="the folder of the pipeline that trained the model")
    parser.add_argument("cells", type=Path, help="the .h5ad that it was trained on")
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    rows = tried(given.model, given.cells)
    for row in rows:
        mark = " " if row["happened"] == row["expected"] else "!"
        print(f"{mark} {row['happened']:8} {row['thing']:36} {row['result'][:100]}")
    if given.json is not None:
        given.json.write_text(json.dumps({"machine": machine(), "things": rows}, indent=1) + "\n")
    sys.exit(int(any(row["happened"] != row["expected"] for row in rows)))


if __name__ == "__main__":
    main()
