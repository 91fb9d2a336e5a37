"""The pictures of an evaluation, with captions; their names are fixed so that runs can be laid side by side."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import numpy as np
from scipy.sparse import vstack

from pipeline.job import EvaluateConfig
from pipeline.report import figures
from pipeline.report.evaluation import Evaluation, Parts, composition
from pipeline.report.html import Picture
from scldm.metrics import expression
from scldm.metrics.baselines import select_like
from scldm.metrics.compare import CellSet, label_agreements

EMBEDDED = 2000  # cells a side in the UMAP


def gallery(
    evaluation: Evaluation,
    config: EvaluateConfig,
    curves: Mapping[str, Sequence[Mapping[str, float]]],
) -> Iterator[Picture]:
    """All pictures, the most telling first.

    Args:
        evaluation: Scores and the cells they are of.
        config: umap, n_neighbors, seed.
        curves: Training records per stage; none, no picture.
    """
    parts = evaluation.parts
    yield _embedding(parts, config)
    real_genes, made_genes = (
        expression.gene_moments(expression.chunks(c.counts)) for c in (parts.real, parts.generated)
    )
    agreement = expression.gene_statistics_agreement(real_genes, made_genes)
    yield Picture(
        "genes",
        "Genes",
        "One dot a gene; mean and variance of log1p CP10k, values below 1e-4 drawn at 1e-4. R² is against the line, "
        "r² is squared Pearson.",
        figures.gene_scatter(real_genes, made_genes, agreement),
    )
    real, generated = (
        {"library size": expression.library_sizes(c.counts), "genes per cell": expression.genes_per_cell(c.counts)}
        for c in (parts.real, parts.generated)
    )
    yield Picture("cells", "Cells", "Shares of cells, raw counts.", figures.cell_histograms(real, generated))
    yield from _heatmaps(parts, config)
    if curves:
        caption = "Loss by optimizer step: training batches grey, validation red. Early high values are cut off."
        yield Picture("training", "Training", caption, figures.training_curves(curves))


def _embedding(parts: Parts, config: EvaluateConfig) -> Picture:
    rng = np.random.default_rng(config.seed)
    real = _concat(parts.real, parts.reference)
    real = real[np.sort(rng.permutation(real.n_cells)[:EMBEDDED])]
    like = select_like(composition(parts.all_generated, parts.given), composition(real, parts.given), rng)
    made = parts.all_generated[like.indices]
    x, y = parts.space.project(real.counts), parts.space.project(made.counts)
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


def _heatmaps(parts: Parts, config: EvaluateConfig) -> Iterator[Picture]:
    agreement = [
        label_agreements(c, reference=parts.reference, space=parts.space, n_neighbors=config.n_neighbors)
        for c in (parts.real, parts.generated)
    ]
    for name in agreement[1]:
        png = figures.label_heatmap(agreement[0][name], agreement[1][name], name=name)
        caption = "Rows: the label of the cell (for generated ones: asked for). Columns: kNN trained on real cells."
        yield Picture(f"labels_{name}", f"Label agreement: {name}", caption, png)


def _concat(a: CellSet, b: CellSet) -> CellSet:
    labels = {k: np.concatenate([a.labels[k], b.labels[k]]) for k in a.labels}
    return CellSet(vstack([a.counts, b.counts], format="csr"), labels)
