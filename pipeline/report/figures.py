"""Draw the figures of a report as PNG bytes. Colors and axes are fixed by name so that two runs can be compared.

Real cells are blue and generated ones orange in all figures. The color of a class depends on its position among the
sorted classes. Axes depend on real cells only, or on nothing: values beyond them are drawn at the edge.
"""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from scldm.metrics.genes.expression import GeneMoments
from scldm.metrics.labels import LabelAgreement

REAL, GENERATED, UNLABELLED = "#2f6db3", "#e07b2e", "#c4c4c4"
DPI = 100
MAX_CLASSES = 20  # classes with a color of their own; the others share one grey


def _png(figure: Figure) -> bytes:
    figure.set_layout_engine("constrained")
    for ax in figure.axes:
        ax.spines[["top", "right"]].set_visible(False)
    out = io.BytesIO()
    # A Figure made without pyplot draws with Agg and leaves no global state behind.
    figure.savefig(out, format="png", dpi=DPI)
    return out.getvalue()


def class_colors(classes: Sequence[str]) -> dict[str, tuple[float, ...] | str]:
    """Return the color of each class."""
    palette = matplotlib.colormaps["tab20"](range(20))
    order = [*range(0, 20, 2), *range(1, 20, 2)]  # the ten strong ones first
    return {c: tuple(palette[order[i]]) if i < MAX_CLASSES else UNLABELLED for i, c in enumerate(sorted(classes))}


def umap_coordinates(real: np.ndarray, generated: np.ndarray, *, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Fit UMAP on real and generated points *together*, in the PCA space fitted on real cells.

    Fitted on real cells alone, UMAP would place each generated cell among its nearest real ones and so hide cells that
    lie off the real manifold. Fitted together, they form islands of their own if they differ.
    """
    import umap  # slow to import (numba)

    both = np.concatenate([real, generated])
    n_neighbors = min(15, len(both) - 1)
    xy = umap.UMAP(n_neighbors=n_neighbors, min_dist=0.3, random_state=seed, n_jobs=1).fit_transform(both)
    return xy[: len(real)], xy[len(real) :]


def embedding(
    real: np.ndarray,
    generated: np.ndarray,
    real_labels: np.ndarray,
    generated_labels: np.ndarray,
    *,
    name: str,
    axis: str,
) -> bytes:
    """Draw three panels: real and generated cells colored by label, and both overlaid."""
    figure = Figure(figsize=(14, 4.6))
    axes = figure.subplots(1, 3, sharex=True, sharey=True)
    classes = sorted({v for v in [*real_labels, *generated_labels] if isinstance(v, str)})
    colors = class_colors(classes)
    size = float(np.clip(12000 / (len(real) + len(generated)), 3, 18))
    for ax, xy, labels, title in (
        (axes[0], real, real_labels, "real"),
        (axes[1], generated, generated_labels, "generated"),
    ):
        ax.scatter(*xy.T, s=size, c=[colors.get(v, UNLABELLED) for v in labels], linewidths=0, rasterized=True)
        ax.set_title(f"{title} (n = {len(xy):,}) by {name}")
    order = np.random.default_rng(0).permutation(len(real) + len(generated))  # neither kind is always on top
    kinds = np.repeat([REAL, GENERATED], [len(real), len(generated)])
    axes[2].scatter(*np.concatenate([real, generated])[order].T, s=size, c=kinds[order], linewidths=0, alpha=0.6)
    axes[2].set_title("overlaid")
    for ax in axes:
        ax.set(xticks=[], yticks=[], xlabel=f"{axis} 1", ylabel=f"{axis} 2")
    for color, text in ((REAL, "real"), (GENERATED, "generated")):
        axes[2].scatter([], [], s=30, color=color, label=text)
    axes[2].legend(loc="best", fontsize=8)
    for c in classes[:MAX_CLASSES]:
        axes[0].scatter([], [], s=30, color=colors[c], label=c)
    if len(classes) > MAX_CLASSES:
        axes[0].scatter([], [], s=30, color=UNLABELLED, label=f"{len(classes) - MAX_CLASSES} more")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside right center", fontsize=8, frameon=False)
    return _png(figure)


def gene_scatter(real: GeneMoments, generated: GeneMoments, agreement: Mapping[str, float]) -> bytes:
    """Draw gene mean, variance (log1p CP10k) and zero fraction, real against generated; R² is for the identity line.

    Without an agreement of zero fractions there is no panel of them.
    """
    names = [n for n in ("mean", "variance", "zero_fraction") if f"gene_{n}_r2" in agreement]
    figure = Figure(figsize=(13, 4.3))
    axes = figure.subplots(1, len(names))
    low = 1e-4
    for ax, name in zip(axes, names, strict=True):
        x, y = getattr(real, name), getattr(generated, name)
        if name != "zero_fraction":
            x, y = np.clip(x, low, 10), np.clip(y, low, 10)
            ax.set(xscale="log", yscale="log", xlim=(low * 0.8, 12), ylim=(low * 0.8, 12))
        else:
            ax.set(xlim=(-0.02, 1.02), ylim=(-0.02, 1.02))
        ax.scatter(x, y, s=4, alpha=0.3, color=GENERATED, linewidths=0)
        ax.axline((low, low), (1, 1), color="black", lw=0.8)
        title = f"gene {name.replace('_', ' ')}"
        ax.set(xlabel=f"real {title}", ylabel=f"generated {title}", aspect="equal")
        ax.set_title(
            f"{title}: R² {agreement[f'gene_{name}_r2']:.3f}, r² {agreement[f'gene_{name}_pearson2']:.3f}", size=10
        )
    return _png(figure)


def shift_scatter(
    real: np.ndarray, generated: np.ndarray, names: Sequence[str], named: np.ndarray, *, against: str = "measured"
) -> bytes:
    """Draw the shift of each gene (mean log1p CP10k minus the control's), generated against measured.

    Args:
        real: Measured shift, (g,).
        generated: Shift of the generated cells, (g,).
        names: Names to write.
        named: Positions of the genes that they belong to.
        against: What `real` is, for the axis.
    """
    figure = Figure(figsize=(5.2, 5))
    ax = figure.subplots()
    reach = 1.05 * float(max(np.abs(real).max(), np.abs(generated).max(), 1e-3))
    ax.scatter(real, generated, s=5, alpha=0.35, color=GENERATED, linewidths=0, rasterized=True)
    ax.axline((0, 0), (1, 1), color="black", lw=0.8)
    ax.axhline(0, color=UNLABELLED, lw=0.6)
    ax.axvline(0, color=UNLABELLED, lw=0.6)
    for name, i in zip(names, named, strict=True):
        ax.annotate(name, (real[i], generated[i]), fontsize=7, xytext=(2, 2), textcoords="offset points")
    ax.set(
        xlim=(-reach, reach), ylim=(-reach, reach), xlabel=f"{against} shift", ylabel="generated shift", aspect="equal"
    )
    return _png(figure)


def cell_histograms(real: Mapping[str, np.ndarray], generated: Mapping[str, np.ndarray]) -> bytes:
    """Draw one panel per statistic of cells (library size, genes per cell), on a log axis of the real cells' range."""
    figure = Figure(figsize=(10, 3.6))
    for ax, name in zip(np.atleast_1d(figure.subplots(1, len(real))), real, strict=True):
        low, high = np.quantile(np.maximum(real[name], 1), [0.001, 0.999])
        bins = np.geomspace(max(low / 2, 0.9), high * 2, 50)
        for values, color, text in ((real[name], REAL, "real"), (generated[name], GENERATED, "generated")):
            clipped = np.clip(values, bins[0], bins[-1])
            weights = np.full(len(values), 1 / len(values))
            ax.hist(clipped, bins, weights=weights, histtype="stepfilled", alpha=0.45, color=color, label=text)
        ax.set(
            xscale="log",
            xlim=(bins[0], bins[-1]),
            xlabel=f"{name} (beyond the axis: at its edge)",
            ylabel="share of cells",
        )
        ticks = [d * 10**e for e in range(7) for d in (1, 2, 5) if bins[0] <= d * 10**e <= bins[-1]]
        ax.set_xticks(ticks, [f"{t:,}" for t in ticks])
        ax.set_xticks([], minor=True)
        ax.legend(fontsize=8, frameon=False)
    return _png(figure)


def label_heatmap(held_out: LabelAgreement, generated: LabelAgreement, *, name: str) -> bytes:
    """Draw a cell's label against that of a kNN classifier, as shares of each row, for held-out and generated cells."""
    classes = sorted(set(held_out.classes) | set(generated.classes))
    side = float(np.clip(0.36 * len(classes) + 1.8, 4, 11))
    figure = Figure(figsize=(2 * side + 0.8, side))
    axes = figure.subplots(1, 2, sharey=True)
    for ax, agreement, title in ((axes[0], held_out, "held-out real"), (axes[1], generated, "generated")):
        image = _shares(ax, agreement, classes)
        ax.set_title(f"{title}: accuracy {agreement.accuracy:.3f} (chance {agreement.chance:.3f})", size=10)
        ax.set_xlabel("predicted by kNN trained on real")
    axes[0].set_ylabel(f"{name} of the cell")
    figure.colorbar(image, ax=axes, label="share of the row", shrink=0.8)
    return _png(figure)


def _shares(ax: Axes, agreement: LabelAgreement, classes: list[str]) -> matplotlib.image.AxesImage:
    place = [classes.index(c) for c in agreement.classes]
    table = np.zeros((len(classes), len(classes)))
    table[np.ix_(place, place)] = agreement.confusion
    share = table / np.maximum(table.sum(1, keepdims=True), 1)
    font = 8 if len(classes) <= 25 else 4
    ax.set_xticks(range(len(classes)), classes, rotation=90, size=font)
    ax.set_yticks(range(len(classes)), classes, size=font)
    for i, j in zip(*np.nonzero(share >= 0.05), strict=True) if len(classes) <= 15 else ():
        ax.text(
            j,
            i,
            f"{share[i, j]:.2f}",
            ha="center",
            va="center",
            size=7,
            color="white" if share[i, j] > 0.5 else "black",
        )
    return ax.imshow(share, cmap="Blues", vmin=0, vmax=1)


def class_heatmap(ratios: Mapping[str, np.ndarray], classes: Sequence[str], metrics: Sequence[str]) -> bytes:
    """Draw distances within classes over those of the floor, one panel per candidate; white is as real cells.

    Args:
        ratios: Candidate -> (classes, metrics); NaN if a ratio does not exist.
        classes: Names with numbers of cells.
    """
    height = float(np.clip(0.3 * len(classes) + 2.0, 3, 14))
    figure = Figure(figsize=(2.6 + 0.75 * len(metrics) * len(ratios), height))
    axes = np.atleast_1d(figure.subplots(1, len(ratios), sharey=True))
    for ax, (name, table) in zip(axes, ratios.items(), strict=True):
        image = ax.imshow(np.log2(table), cmap="RdBu_r", vmin=-3, vmax=3, aspect="auto")
        ax.set_xticks(range(len(metrics)), metrics, rotation=45, ha="right", size=8)
        ax.set_yticks(range(len(classes)), classes, size=8 if len(classes) <= 30 else 6)
        ax.set_title(name, size=10)
        for (i, j), value in np.ndenumerate(table) if len(classes) <= 30 else ():
            ax.text(
                j, i, f"{value:.2g}" if np.isfinite(value) else "–", ha="center", va="center", size=7,
                color="white" if abs(np.log2(value)) > 2 else "black",
            )  # fmt: skip
    bar = figure.colorbar(image, ax=axes, shrink=0.8, ticks=[-3, -2, -1, 0, 1, 2, 3])
    bar.ax.set_yticklabels(["1/8", "1/4", "1/2", "1", "2", "4", "8"])
    bar.set_label("over the floor's")
    return _png(figure)


def training_curves(stages: Mapping[str, Sequence[Mapping[str, float]]]) -> bytes:
    """Draw loss against optimizer step, one panel per stage; records hold step and train/loss, val/loss or both."""
    figure = Figure(figsize=(5 * len(stages), 3.6))
    for ax, (stage, records) in zip(np.atleast_1d(figure.subplots(1, len(stages))), stages.items(), strict=True):
        for key, style in (
            ("train/loss", {"color": "#888888", "lw": 1}),
            ("val/loss", {"color": "#b3312f", "lw": 1.8, "marker": "o", "ms": 3}),
        ):
            points = [(r["step"], r[key]) for r in records if r.get(key) is not None]
            if points:
                ax.plot(*zip(*points, strict=True), label=key, **style)
        values = [r["train/loss"] for r in records if r.get("train/loss") is not None]
        if len(values) > 20:
            # The first steps are orders of magnitude higher and would flatten the rest.
            ax.set_ylim(top=float(np.quantile(values, 0.97)) * 1.05 if min(values) > 0 else None)
        ax.set(title=stage, xlabel="optimizer step", ylabel="loss")
        if ax.lines:
            ax.legend(fontsize=8, frameon=False)
    return _png(figure)
