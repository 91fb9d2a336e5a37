"""Compare generated with real cells in one call: the main scores of the evaluate stage, with their floor.

The **floor** is the score of real against real cells: no generator can be expected to do better. Real cells are divided
into three parts by seed: one fits the space and trains the label classifier, one is the reference, one is the floor.

What a Gaussian head draws, log1p CP10k values, is compared with real cells on that scale. It has no library sizes and
no zeros, so the scores of these are left out: `attrs["left_out"]` of the table names them with the reason.
"""

from __future__ import annotations

import anndata
import numpy as np
import pandas as pd

from scldm.api.arguments import Arguments
from scldm.data.cell_counts import LOG1P_CP10K, CellsError, count_problem, is_log_normalised, layers_of, matrix_of
from scldm.data.class_names import class_names
from scldm.errors import extra
from scldm.metrics.cell_set import CellSet
from scldm.metrics.compare import ONLY_OF_COUNTS
from scldm.metrics.distribution import distances, two_sample
from scldm.metrics.distribution.projection import RealSpace
from scldm.metrics.genes import expression

with extra("score"):
    from sklearn.neighbors import KNeighborsClassifier

ABOUT = {  # which way is better, and what it is
    "w2": ("lower", "Wasserstein-2, exact"),
    "mmd2": ("lower", "MMD², five σ (CFGen)"),
    "frechet": ("lower", "Fréchet distance (squared)"),
    "energy": ("lower", "energy distance"),
    "auroc": ("0.5", "AUROC real/generated, logistic"),
    "precision": ("higher", "precision"),
    "recall": ("higher", "recall"),
    "coverage": ("higher", "coverage"),
    "library_size_ks": ("lower", "library size, KS"),
    "genes_per_cell_ks": ("lower", "genes per cell, KS"),
    "zero_fraction_difference": ("lower", "zero fraction, absolute difference"),
    "label_accuracy": ("higher", "kNN trained on real cells recovers the label"),
}
LABEL = "label"  # name that the label has in sets of cells, whatever the column is called
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
    """Score generated cells against real ones. Returns one row per score: `generated`, `floor`, `better`, `title`.

    The table's `attrs` hold `scale`, on which cells were compared (counts or log1p_cp10k), and `left_out`, scores that
    do not exist there with the reason.

    Args:
        generated: Counts in X, over the genes of var_names; or the log1p CP10k values of a Gaussian head, if
            uns["scldm"]["scale"] says so.
        real: Counts of cells that the models were not trained on, with at least those genes, by var_names or
            `feature_id`.
        label: obs column of both; adds how well a kNN trained on real cells recovers it.
        layer: Layer of the real counts; None: X.
        max_cells: Cells on each side, drawn by seed.
        n_pcs: Dimensions of the space; fewer for few cells or genes.

    Raises:
        CellsError: Too few cells, values that are no counts, genes that the real cells lack, or a label that one side
            lacks.

    >>> score(model.generate(n=60), real=adata).loc["w2", ["better", "title"]].tolist()
    ['lower', 'Wasserstein-2, exact']
    """
    given = Arguments()
    generated, real = given.anndata("generated", generated), given.anndata("real", real)
    given.text("label", label)
    given.text("layer", layer)
    max_cells, n_pcs = given.whole("max_cells", max_cells, least=FEWEST // 3), given.whole("n_pcs", n_pcs, least=1)
    seed = given.seed(seed)
    given.raise_problems()
    require_pair(generated, real, label, layer)
    known, every = sides(generated, real, label, layer)
    rng = np.random.default_rng(seed)
    order = rng.permutation(real.n_obs)
    n = min(real.n_obs // 3, max_cells)
    reference, held_out, others = (known[np.sort(order[k * n : (k + 1) * n])] for k in range(3))
    made = every[np.sort(rng.permutation(generated.n_obs)[:n])]
    n_pcs = min(n_pcs, n - 1, generated.n_vars - 1)
    space = RealSpace.fit(reference.counts, n_top_genes=2000, n_pcs=n_pcs, seed=seed)
    scores = {
        name: _scores(held_out, side, reference, space, seed=seed, counted=made.counted)
        for name, side in (("generated", made), ("floor", others))
    }
    table = pd.DataFrame(scores)
    about = [ABOUT[name] for name in table.index]
    table = table.assign(better=[better for better, _ in about], title=[title for _, title in about])
    table.attrs["scale"] = "counts" if made.counted else LOG1P_CP10K
    table.attrs["left_out"] = {} if made.counted else {k: v for k, v in ONLY_OF_COUNTS.items() if k in ABOUT}
    return table


def sides(
    generated: anndata.AnnData, real: anndata.AnnData, label: str | None, layer: str | None
) -> tuple[CellSet, CellSet]:
    """Return real and generated cells over the genes of the generated ones; both must hold what they say."""
    values = {
        "real": matrix_of(real, layer, argument="real"),
        "generated": matrix_of(generated, None, argument="generated"),
    }
    remedy = {
        "real": f"name the layer of counts with layer= ({layers_of(real)})",
        "generated": "give them as the model draws them, before they are normalised or log-transformed",
    }
    problems = [
        f"{side}: {problem}; scores compare counts with counts: {remedy[side]}"
        for side, adata in (("generated", generated), ("real", real))
        if not (side == "generated" and is_log_normalised(adata.uns))
        and (problem := count_problem(values[side], adata))
    ]
    if problems:
        raise CellsError("\n".join(problems))
    names = [{} if label is None else {LABEL: class_names(adata.obs[label])} for adata in (real, generated)]
    columns = _gene_names(real).get_indexer(generated.var_names)
    known = CellSet(expression.as_counts(values["real"])[:, columns], names[0])
    if is_log_normalised(generated.uns):
        return known, CellSet(expression.as_log_values(values["generated"]), names[1], counted=False)
    return known, CellSet(expression.as_counts(values["generated"]), names[1])


def _scores(
    real: CellSet, side: CellSet, reference: CellSet, space: RealSpace, *, seed: int, counted: bool
) -> dict[str, float]:
    """Score one side against held-out real cells; the classifier is trained on the reference."""
    x, y = space.place(real), space.place(side)
    m = min(len(x), len(y))  # two-sample scores want equal numbers
    manifolds = two_sample.manifold_metrics(x[:m], y[:m])
    found = {
        "w2": distances.wasserstein(x, y, power=2, max_points=1000, rng=np.random.default_rng(seed)),
        "mmd2": distances.mmd2_rbf(x, y),
        "frechet": distances.frechet_distance(x, y),
        "energy": distances.energy_distance(x, y),
        "auroc": two_sample.classifier_auroc(x[:m], y[:m], seed=seed),
        "precision": manifolds.precision,
        "recall": manifolds.recall,
        "coverage": manifolds.coverage,
        **(_count_scores(real, side) if counted else {}),
    }
    if (labels := reference.labels.get(LABEL)) is not None:
        known = np.array([x is not None for x in labels])
        points = space.place(reference)[known]
        judge = KNeighborsClassifier(min(15, len(points))).fit(points, labels[known].astype(str))
        found["label_accuracy"] = float((judge.predict(y) == side.labels[LABEL]).mean())
    return found


def _count_scores(real: CellSet, side: CellSet) -> dict[str, float]:
    sizes = [expression.library_sizes(s.counts) for s in (real, side)]
    genes = [expression.genes_per_cell(s.counts) for s in (real, side)]
    return {
        "library_size_ks": expression.ks_statistic(*sizes),
        "genes_per_cell_ks": expression.ks_statistic(*genes),
        "zero_fraction_difference": abs(expression.zero_fraction(side.counts) - expression.zero_fraction(real.counts)),
    }


def require_pair(
    generated: anndata.AnnData, real: anndata.AnnData, label: str | None, layer: str | None, *, fewest: int = FEWEST
) -> None:  # fmt: skip
    """Raise CellsError for cells that cannot be compared; all problems are listed.

    Args:
        fewest: Real cells at least, and a third of it generated ones.
    """
    problems = []
    if is_log_normalised(real.uns):
        problems.append(
            "real holds log1p CP10k values of a gaussian head (uns['scldm']['scale']), and real cells are needed with "
            "their counts"
        )
    if real.n_obs < fewest:
        problems.append(f"{real.n_obs} real cells are too few to deal to three parts; at least {fewest} are needed")
    if generated.n_obs < fewest // 3:
        problems.append(f"{generated.n_obs} generated cells are too few; at least {fewest // 3} are needed")
    lacking = [g for g in generated.var_names if g not in _gene_names(real)]
    if lacking:
        problems.append(
            f"the real cells lack {len(lacking)} of {generated.n_vars} genes (first: {', '.join(lacking[:3])}); score "
            "shared genes only: generated[:, shared]"
        )
    for side, adata in (("generated", generated), ("real", real)):
        if label is not None and label not in adata.obs:
            problems.append(f"{side}.obs has no column {label!r}; it has {', '.join(map(str, adata.obs)) or 'none'}")
        elif label is not None and all(x is None for x in class_names(adata.obs[label])):
            problems.append(f"no cell of {side} has a value in obs[{label!r}]")
    if layer is not None and layer not in real.layers:
        problems.append(f"real has no layer {layer!r}; it has {', '.join(real.layers) or 'none'}")
    if problems:
        raise CellsError("\n".join(problems))


def _gene_names(adata: anndata.AnnData) -> pd.Index:
    return pd.Index(adata.var["feature_id"].astype(str) if "feature_id" in adata.var else adata.var_names)
