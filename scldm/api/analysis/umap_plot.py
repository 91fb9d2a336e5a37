"""One UMAP of real and generated cells, in the principal components of the real ones (log1p CP10k).

Shape letters: n real cells, b generated cells, p coordinates.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import anndata
import numpy as np

from scldm.api.scoring import require_pair, sides
from scldm.data.class_names import class_names
from scldm.errors import extra
from scldm.metrics.distribution.projection import RealSpace

with extra("plot"):
    import umap
    from matplotlib import pyplot as plt

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

FITS = ("real", "both")
FEWEST, NEIGHBOURS = 10, 15
GENES, COMPONENTS = 2000, 30
NO_CLASS = "lightgrey"


def plot(
    generated: anndata.AnnData, real: anndata.AnnData, *, color: str | None, layer: str | None, fit: str, seed: int
) -> Figure:
    """Draw real and generated cells over each other and, with `color`, each by its classes."""
    require_pair(generated, real, color, layer, fewest=FEWEST)
    known, made = sides(generated, real, color, layer)
    n_pcs = min(COMPONENTS, known.n_cells - 1, generated.n_vars - 1)
    space = RealSpace.fit(known.counts, n_top_genes=GENES, n_pcs=n_pcs, seed=seed)
    xy = coordinates(space.place(known), space.place(made), fit=fit, seed=seed)
    figure, axes = plt.subplots(1, 1 if color is None else 3, figsize=(5 if color is None else 15, 5), squeeze=False)
    plt.close(figure)  # a notebook shows what the call returns, and not a second time
    size = float(np.clip(12_000 / (known.n_cells + made.n_cells), 2, 20))
    for name, points, paint in (("real", xy[0], "C0"), ("generated", xy[1], "C1")):
        axes[0, 0].scatter(
            points[:, 0], points[:, 1], s=size, c=paint, linewidths=0, alpha=0.6, label=f"{name} ({len(points):,})"
        )
    axes[0, 0].legend(markerscale=3, frameon=False)
    if color is not None:
        names = [class_names(adata.obs[color]) for adata in (real, generated)]
        classes = sorted({x for side in names for x in side if x is not None})
        for ax, points, side, title in zip(axes[0, 1:], xy, names, ("real", "generated"), strict=True):
            by_class(ax, points, side, classes, size)
            ax.set(title=f"{title} by {color}", xlim=axes[0, 0].get_xlim(), ylim=axes[0, 0].get_ylim())
        axes[0, 2].legend(loc="center left", bbox_to_anchor=(1, 0.5), markerscale=3, frameon=False)
    for ax in axes[0]:
        ax.set(xlabel="UMAP 1", ylabel="UMAP 2", xticks=[], yticks=[])
    figure.tight_layout()
    return figure


def by_class(ax: Axes, points: np.ndarray, names: np.ndarray, classes: list[str], size: float) -> None:
    """Draw cells by class; those without one in grey."""
    colors = plt.get_cmap("tab20").colors  # type: ignore[attr-defined]
    unknown = np.array([name is None for name in names], dtype=bool)
    ax.scatter(points[unknown, 0], points[unknown, 1], s=size, c=NO_CLASS, linewidths=0)
    for k, name in enumerate(classes):
        own = points[names == name]
        ax.scatter(own[:, 0], own[:, 1], s=size, color=colors[k % len(colors)], linewidths=0, label=name)


def coordinates(real: np.ndarray, generated: np.ndarray, *, fit: str, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Return UMAP coordinates of real (n, p) and generated cells (b, p), (n, 2) and (b, 2).

    Args:
        fit: "real": fitted to real cells, in which each generated cell gets a place among its nearest real ones, near
            or far. "both": fitted to all, in which generated cells that no real ones are like make islands.
        seed: Of UMAP.
    """
    points = real if fit == "real" else np.concatenate([real, generated])
    mapper = umap.UMAP(n_neighbors=min(NEIGHBOURS, len(points) - 1), min_dist=0.3, random_state=seed, n_jobs=1)
    found = mapper.fit_transform(points)
    return (found, mapper.transform(generated)) if fit == "real" else (found[: len(real)], found[len(real) :])
