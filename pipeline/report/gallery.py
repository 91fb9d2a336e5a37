"""Draw the pictures of an evaluation, with captions; names are fixed so that runs can be compared."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import numpy as np
from scipy.sparse import vstack

from pipeline.config.job import EvaluateConfig
from pipeline.report import figures
from pipeline.report.cells import EvaluationCells
from pipeline.report.evaluation import NB, Evaluation
from pipeline.report.html import Picture
from scldm.metrics.baselines import select_like
from scldm.metrics.cell_set import LABELS, CellSet, class_text
from scldm.metrics.genes import expression

EMBEDDED = 2000  # cells a side in the UMAP
MAX_CLASSES = 40  # rows of a heat map: the classes with most real cells
IN_CLASSES = ("w2", "mmd2", "frechet", "energy")


def gallery(
    evaluation: Evaluation,
    config: EvaluateConfig,
    curves: Mapping[str, Sequence[Mapping[str, float]]],
) -> Iterator[Picture]:
    """Yield all pictures, the most informative first.

    Args:
        evaluation: Scores and the cells that were scored.
        config: Settings; umap, n_neighbors and seed are used.
        curves: Training records by stage; without any there is no picture of them.
    """
    parts = evaluation.parts
    yield _embedding(parts, config)
    real_genes, made_genes = (expression.moments_of(c.log_chunks()) for c in (parts.real, parts.generated))
    counted = parts.generated.counted
    agreement = expression.gene_statistics_agreement(real_genes, made_genes, counted=counted)
    yield Picture(
        "genes",
        "Genes",
        "One dot a gene; mean and variance of log1p CP10k, values below 1e-4 drawn at 1e-4. R² is against the line, "
        "r² is squared Pearson.",
        figures.gene_scatter(real_genes, made_genes, agreement),
    )
    if counted:
        yield _histograms(parts)
    yield from _heatmaps(evaluation)
    yield from _class_heatmaps(evaluation)
    if curves:
        caption = "Loss by optimizer step: training batches grey, validation red. Early high values are cut off."
        yield Picture("training", "Training", caption, figures.training_curves(curves))


def _histograms(parts: EvaluationCells) -> Picture:
    real, generated = (
        {"library size": expression.library_sizes(c.counts), "genes per cell": expression.genes_per_cell(c.counts)}
        for c in (parts.real, parts.generated)
    )
    return Picture("cells", "Cells", "Shares of cells, raw counts.", figures.cell_histograms(real, generated))


def _embedding(parts: EvaluationCells, config: EvaluateConfig) -> Picture:
    rng = np.random.default_rng(config.seed)
    real = _concat(parts.real, parts.reference)
    real = real[np.sort(rng.permutation(real.n_cells)[:EMBEDDED])]
    like = select_like(parts.all_generated.crossed(parts.given), real.crossed(parts.given), rng)
    made = parts.all_generated[like.indices]
    x, y = parts.space.place(real), parts.space.place(made)
    if config.umap:
        axis, how = "UMAP", "UMAP fitted on both kinds together, in the PCA space fitted on real training cells"
        x, y = figures.umap_coordinates(x, y, seed=config.seed)
    else:
        axis, how = "PC", "The first two principal components, fitted on real training cells"
        x, y = x[:, :2], y[:, :2]
    name = next(iter(parts.given), next(iter(parts.real.labels)))
    png = figures.embedding(x, y, real.labels[name], made.labels[name], name=name, axis=axis)
    caption = f"{how}. Generated cells are drawn at the composition of the real ones (held-out and training)."
    return Picture("embedding", "Real and generated cells", caption, png)


def _heatmaps(evaluation: Evaluation) -> Iterator[Picture]:
    comparison = evaluation.comparison
    held_out, generated = (
        comparison.judges.agreements(comparison.space.place(c), c.labels)
        for c in (evaluation.parts.real, evaluation.parts.generated)
    )
    for name in generated:
        png = figures.label_heatmap(held_out[name], generated[name], name=name)
        caption = "Rows: the label of the cell (of a generated one: as requested). Columns: kNN trained on real cells."
        yield Picture(f"labels_{name}", f"Label agreement: {name}", caption, png)


def _class_heatmaps(evaluation: Evaluation) -> Iterator[Picture]:
    """Draw distances within classes over the floor's, for generated cells, the NB baseline and extra candidates."""
    others = [n for n in evaluation.baselines if n == NB or n in evaluation.parts.extra]
    for name, table in evaluation.classes["generated"].items():
        floor = evaluation.classes["floor"][name].classes
        common = sorted(set(table.classes) & set(floor), key=lambda c: -table.classes[c].n_real)[:MAX_CLASSES]
        if not common:
            continue
        ratios = {}
        for candidate in ("generated", *others):
            own = evaluation.classes[candidate][name].classes
            ratios[candidate] = np.full((len(common), len(IN_CLASSES)), np.nan)
            for i, c in enumerate(common):
                if c in own:
                    ratios[candidate][i] = [_ratio(own[c].values[m][0], floor[c].values[m][0]) for m in IN_CLASSES]
        classes = [f"{class_text(c)} ({table.classes[c].n_real:,})" for c in common]
        caption = (
            "Distance of a class's cells to the held-out real ones, over the floor's: 1 is as real cells are. In "
            f"brackets: real cells. {len(common)} of {len(table.classes) + len(table.left_out)} classes."
        )
        title = f"Distances within classes: {name.replace(LABELS, ' × ')}"
        yield Picture(f"conditional_{name}", title, caption, figures.class_heatmap(ratios, classes, IN_CLASSES))


def _ratio(value: float, floor: float) -> float:
    """Return value / floor; NaN, drawn as a dash, if a distance is 0, whose logarithm does not exist."""
    return value / floor if value > 0 and floor > 0 else np.nan


def _concat(a: CellSet, b: CellSet) -> CellSet:
    labels = {k: np.concatenate([a.labels[k], b.labels[k]]) for k in a.labels}
    return CellSet(vstack([a.counts, b.counts], format="csr"), labels)
