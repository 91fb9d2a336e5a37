"""The model in a notebook: how long until the first picture of generated cells, and what the threads of torch cost.

first_picture_seconds   a new process: `import scldm`, read the cells, take 2,000 genes, scldm.train(quick=True), and a
                        UMAP of real and generated cells as a PNG
generate_threads        time of Model.generate with torch's default threads over that with one thread
generate_under_load     the same beside as many busy processes as the machine has cores

python benchmarks/notebook.py ../shared/data/pbmc3k_full.h5ad --json benchmarks/results/notebook.json
python benchmarks/notebook.py ../shared/data/pbmc3k_full.h5ad --quick       # does it run at all
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import textwrap
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from harness import Row, alternate, report

import scldm

ROOT = Path(__file__).resolve().parents[1]
BUSY = "import torch\ntorch.set_num_threads(1)\na = torch.randn(600, 600)\nwhile True: a @ a"
FIRST_PICTURE = """
    import json, sys, time
    began = time.perf_counter()
    import scldm
    import anndata
    import scanpy as sc

    cells, label, settings = sys.argv[1], sys.argv[2], json.loads(sys.argv[3])
    adata = sc.read_h5ad(cells)
    sc.pp.highly_variable_genes(adata, n_top_genes=2000, flavor="seurat_v3")
    adata = adata[:, adata.var["highly_variable"]].copy()
    model = scldm.train(adata, labels=[label], name="first", quick=True, settings=settings)
    made = model.generate(adata.obs[[label]], seed=0)
    both = anndata.concat({"real": model.align(adata), "generated": made}, label="source", index_unique="-")
    both.X = both.X.astype("float32")
    sc.pp.normalize_total(both, target_sum=1e4)
    sc.pp.log1p(both)
    sc.pp.pca(both, n_comps=30)
    sc.pp.neighbors(both)
    sc.tl.umap(both)
    sc.pl.umap(both, color=["source", label], show=False).__class__
    import matplotlib.pyplot as plt
    plt.savefig("first.png")
    print("seconds", time.perf_counter() - began)
"""


def first_picture(cells: Path, label: str, folder: Path, settings: dict[str, int]) -> float:
    """Return the seconds from `import scldm` to the picture, in a new process."""
    code = textwrap.dedent(FIRST_PICTURE)
    env = {**os.environ, "PYTHONPATH": str(ROOT), "MPLBACKEND": "Agg"}
    ran = subprocess.run(
        [sys.executable, "-c", code, str(cells.resolve()), label, json.dumps(settings)], cwd=folder, env=env,
        stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    if ran.returncode or not (folder / "first.png").is_file():
        raise SystemExit(f"no picture came out:\n{ran.stdout[-3000:]}")
    return float(ran.stdout.rsplit("seconds", 1)[1])


@contextmanager
def busy(processes: int) -> Iterator[None]:
    """Keep all cores busy with other processes."""
    others = [subprocess.Popen([sys.executable, "-c", BUSY]) for _ in range(processes)]
    time.sleep(5)
    try:
        yield
    finally:
        for other in others:
            other.kill()
            other.wait()


def threads_row(name: str, model: scldm.Model, *, n_cells: int, n: int) -> Row:
    """Compare torch's default threads with one; the ratio is above 1 where the default is faster."""
    default = torch.get_num_threads()
    label, classes = next(iter(model.labels.items()))

    def generate(threads: int) -> None:
        torch.set_num_threads(threads)
        try:
            model.generate({label: classes[0]}, n=n_cells, seed=0)
        finally:
            torch.set_num_threads(default)

    return alternate(name, lambda: generate(default), lambda: generate(1), work=n_cells, unit="cells/s", n=n)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cells", type=Path, help=".h5ad with raw counts of more than 2,000 genes")
    parser.add_argument("--label", default="cell_type")
    parser.add_argument("--quick", action="store_true", help="few steps and cells: does it run at all")
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    settings = {"train_vae.train.max_steps": 20, "train_flow.train.max_steps": 20} if given.quick else {}
    n_cells, n = (64, 1) if given.quick else (512, 5)
    with tempfile.TemporaryDirectory() as folder:
        seconds = first_picture(given.cells, given.label, Path(folder), settings)
        model = scldm.load(Path(folder) / "runs" / "first")
        rows = [
            Row("first_picture_seconds", seconds, "s", 180.0, 180.0 / seconds, 1, None),
            threads_row("generate_threads", model, n_cells=n_cells, n=n),
        ]
        with busy(os.cpu_count() or 1):
            rows.append(threads_row("generate_under_load", model, n_cells=n_cells, n=n))
    report(rows, given.json)


if __name__ == "__main__":
    main()
