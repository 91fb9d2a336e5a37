"""Small files of cells, and what is said of them."""

from __future__ import annotations

from pathlib import Path

import anndata as ad
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp

from pipeline.data.inspection.examine import Question, examine

ROOT = Path(__file__).resolve().parents[3]
SHARED = ROOT.parent / "shared" / "data"
real = pytest.mark.skipif(not SHARED.is_dir(), reason=f"the real cells are not at {SHARED}")
pytestmark = pytest.mark.filterwarnings("ignore")
N, G = 40, 6


def counts() -> np.ndarray:
    return np.random.default_rng(0).poisson(0.7, (N, G)).astype(np.float32) + np.eye(N, G, dtype=np.float32) + 1


def save(path, x=None, genes=None, names=None, **obs):
    x = sp.csr_matrix(counts()) if x is None else x
    n, g = x.shape
    frame = pd.DataFrame({"cell_type": (["a", "b"] * n)[:n], **obs}, index=names or [f"c{i}" for i in range(n)])
    var = pd.DataFrame(index=genes or [f"ENSG{i:011d}" for i in range(g)])
    ad.AnnData(x, obs=frame, var=var).write_h5ad(path)
    return path


def look(path, *labels, **question):
    [found] = examine(Question(str(path), labels=labels, **question))
    return found


def told(found) -> str:
    return "\n".join(f.text() for f in found.findings)
