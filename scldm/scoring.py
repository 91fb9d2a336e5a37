"""Generated cells beside real ones, in one call: the scores of the evaluate stage with their floor.

The **floor** is real against real: no generator should be expected to be nearer. Real cells are dealt to three parts by
seed: one fits the space and teaches the label classifier, one is what both sides are compared with, one is the floor.
"""

from __future__ import annotations

import anndata
import numpy as np
import pandas as pd
import scipy.sparse as sp

from scldm.align import CellsError
from scldm.metrics.compare import CellSet, CompareSettings, compare
from scldm.metrics.projection import RealSpace

FEWEST = 60  # real cells; fewer leave thirds that say nothing


def score(
    generated: anndata.AnnData,
    *,
    real: anndata.AnnData,
    label: str | None = None,
    layer: str | None = None,
    max_cells: int = 2000,
    n_pcs: int = 30,
    seed: int = 0,
) -> pd.DataFrame:
    """How near generated cells are to real ones: a row a score, with `generated`, `floor`, `better`, `title`.

    Args:
        generated: Counts in X, over the genes of var_names.
        real: Cells that the models were not trained on, with at least those genes, by var_names or `feature_id`.
        label: obs column of both; adds how well a kNN trained on real cells recovers it.
        layer: Where the real counts are; None: X.
        max_cells: Cells a side, drawn by seed.
        n_pcs: Coordinates of the space, fewer for few cells or genes.

    Raises:
        CellsError: too few cells, genes that the real cells lack, a label that one side lacks.

    >>> score(model.generate(n=60), real=adata).loc["w2", ["better", "title"]].tolist()
    ['lower', 'Wasserstein-2, exact']
    """
    _require(generated, real, label)
    rng = np.random.default_rng(seed)
    known, made = _cell_set(real, generated, label, layer), _own(generated, label)
    order = rng.permutation(known.n_cells)
    n = min(known.n_cells // 3, max_cells)
    reference, held_out, others = (known[order[k * n : (k + 1) * n]] for k in range(3))
    made = made[np.sort(rng.permutation(made.n_cells)[:n])]
    n_pcs = min(n_pcs, n - 1, generated.n_vars - 1)
    space = RealSpace.fit(reference.counts, n_top_genes=2000, n_pcs=n_pcs, seed=seed)
    settings = CompareSettings(n_neighbors=min(15, n), transport_cells=1000, seed=seed)
    scores, floor = (
        compare(held_out, side, reference=reference, space=space, settings=settings) for side in (made, others)
    )
    rows = {
        name: {"generated": s.value, "floor": floor[name].value, "better": s.better, "title": s.title}
        for name, s in scores.items()
        if name in floor
    }
    return pd.DataFrame.from_dict(rows, orient="index")


def _require(generated: anndata.AnnData, real: anndata.AnnData, label: str | None) -> None:
    problems = []
    if real.n_obs < FEWEST:
        problems.append(f"{real.n_obs} real cells are too few to deal to three parts; at least {FEWEST} are needed")
    if generated.n_obs < FEWEST // 3:
        problems.append(f"{generated.n_obs} generated cells are too few; at least {FEWEST // 3} are needed")
    lacking = [g for g in generated.var_names if g not in _gene_names(real)]
    if lacking:
        problems.append(
            f"the real cells lack {len(lacking)} of {generated.n_vars} genes (first: {', '.join(lacking[:3])}); score "
            "shared genes only: generated[:, shared]"
        )
    for side, adata in (("generated", generated), ("real", real)):
        if label is not None and label not in adata.obs:
            problems.append(f"{side}.obs has no column {label!r}; it has {', '.join(map(str, adata.obs)) or 'none'}")
    if problems:
        raise CellsError("\n".join(problems))


def _gene_names(adata: anndata.AnnData) -> pd.Index:
    return pd.Index(adata.var["feature_id"].astype(str) if "feature_id" in adata.var else adata.var_names)


def _cell_set(real: anndata.AnnData, generated: anndata.AnnData, label: str | None, layer: str | None) -> CellSet:
    """Real cells over the generated cells' genes."""
    columns = _gene_names(real).get_indexer(generated.var_names)
    counts = sp.csr_matrix(real.X if layer is None else real.layers[layer])[:, columns]
    return CellSet(counts, _labels(real, label))


def _own(generated: anndata.AnnData, label: str | None) -> CellSet:
    return CellSet(sp.csr_matrix(generated.X), _labels(generated, label))


def _labels(adata: anndata.AnnData, label: str | None) -> dict[str, np.ndarray]:
    if label is None:
        return {}
    values = adata.obs[label].astype(object)
    return {label: values.where(values.notna(), None).map(lambda v: None if v is None else str(v)).to_numpy(object)}
