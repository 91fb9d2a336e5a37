"""How long and how much memory `evaluate` takes, by the number of cells, genes and resamples: no training, no Ray.

Cells are drawn from a mixture of negative binomials; what they are makes no difference to the time. The streamed part
reads shards that are hard links to one file.

    python benchmarks/evaluation.py --cells 500 1000 --genes 1000 --shards 4 40
"""

from __future__ import annotations

import argparse
import json
import resource
import tempfile
import time
from pathlib import Path

import numpy as np
import pandas as pd
import scipy.sparse as sp
from anndata import AnnData

from pipeline.config.job import EvaluateConfig
from pipeline.core.manifest import Manifest, write_manifest
from pipeline.report.evaluation import evaluate
from pipeline.report.streamed import stream_generated
from scldm.cells.cells import open_cells
from scldm.metrics.from_anndata import cell_set

TYPES = 8


def cells(n: int, n_genes: int, seed: int) -> AnnData:
    rng = np.random.default_rng(seed)
    profiles = np.random.default_rng(0).lognormal(-2.5, 1.5, (TYPES, n_genes))
    types = rng.integers(TYPES, size=n)
    blocks = []
    for start in range(0, n, 2000):
        rate = profiles[types[start : start + 2000]] * rng.lognormal(0, 0.3, (len(types[start : start + 2000]), 1))
        blocks.append(sp.csr_matrix(rng.poisson(rate * rng.gamma(2.0, 0.5, rate.shape)).astype(np.float32)))
    names = pd.Categorical(np.array([f"type {i}" for i in range(TYPES)])[types])
    obs = pd.DataFrame({"cell_type": names}, index=[f"{seed}-{i}" for i in range(n)])
    return AnnData(sp.vstack(blocks, format="csr"), obs, pd.DataFrame(index=[f"g{i}" for i in range(n_genes)]))


def peak_gib() -> float:
    """Of the process so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def scored(n: int, n_genes: int) -> dict[str, float]:
    """Seconds of one in-memory evaluation without pictures, n cells a side, twice as many training cells."""
    config = EvaluateConfig(max_cells=n, umap=False)
    held_out, training, generated = cells(n, n_genes, 1), cells(3 * n, n_genes, 2), cells(2 * n, n_genes, 3)
    start, cpu = time.perf_counter(), time.process_time()
    evaluate(held_out=held_out, training=training, generated=generated, labels=["cell_type"], config=config)
    seconds, cpu = time.perf_counter() - start, time.process_time() - cpu
    return {
        "cells": n,
        "genes": n_genes,
        "evaluate_s": round(seconds, 1),
        "cpu_s": round(cpu, 1),
        "peak_gib": round(peak_gib(), 2),
    }


def streamed(n_shards: int, n_genes: int, n_real: int, per_shard: int = 25_000) -> dict[str, float]:
    """Seconds and memory of one pass over so many shards, beside n_real cells in memory."""
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        (root / "cells").mkdir()
        first = root / "cells" / "part-00000.h5ad"
        cells(per_shard, n_genes, 4).write_h5ad(first)
        files = [f"cells/part-{k:05d}.h5ad" for k in range(n_shards)]
        for file in files[1:]:
            (root / file).hardlink_to(first)
        facts = {"shards": [{"file": f, "n_cells": per_shard, "sha256": "0" * 64} for f in files]}
        write_manifest(Manifest("generate", "v", name, {}, {}, facts, seconds=0, finished_at=0))
        real = cell_set(cells(n_real, n_genes, 5), ["cell_type"])
        start, cpu = time.perf_counter(), time.process_time()
        stream_generated(open_cells(root), real, ["cell_type"])
        seconds, cpu = time.perf_counter() - start, time.process_time() - cpu
    return {
        "generated_cells": n_shards * per_shard, "real_cells": n_real, "genes": n_genes, "stream_s": round(seconds, 1),
        "cpu_s": round(cpu, 1), "peak_gib": round(peak_gib(), 2),
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cells", type=int, nargs="*", default=[500, 1000])
    parser.add_argument("--genes", type=int, default=1000)
    parser.add_argument("--shards", type=int, nargs="*", default=[4, 40])
    parser.add_argument("--real", type=int, default=500, help="real cells beside the streamed ones")
    args = parser.parse_args()
    for n in args.shards:
        print(json.dumps(streamed(n, args.genes, args.real)), flush=True)
    for n in args.cells:
        print(json.dumps(scored(n, args.genes)), flush=True)


if __name__ == "__main__":
    main()
