"""Score generated cells against held-out real ones: scores, figures and a verdict, all in memory.

Candidates (generated cells, floor, baselines) are cut to the number and the composition of the held-out real cells
before they are scored, so that neither sample size nor composition is taken for a fault of the cells.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from anndata import AnnData

from pipeline.job import EvaluateConfig
from pipeline.report.html import MetricRow
from scldm.metrics import expression
from scldm.metrics.baselines import LabelBaseline, select_like
from scldm.metrics.compare import CellSet, CompareSettings, Group, Score, compare, label_scores
from scldm.metrics.projection import RealSpace
from scldm.metrics.reconstruction import Reconstruction, reconstruction_scores

POISSON, NB = "per-label Poisson", "per-label NB"
SHORT_NAMED = 5  # classes named in a note


@dataclass(frozen=True)
class Decoded:
    """What the VAE made of some held-out cells."""

    rows: np.ndarray  # (n,) positions among the held-out cells
    mu: np.ndarray  # (n, g) mean counts
    nll: np.ndarray  # (n,) nats summed over genes


@dataclass(frozen=True)
class Parts:
    """Cells by the role they play."""

    real: CellSet  # held out
    reference: CellSet  # training cells that fit the space, the label classifier and the baselines
    floor: CellSet  # other training cells, as many as held out
    generated: CellSet  # as many as held out, of the same composition
    all_generated: CellSet
    given: tuple[str, ...]  # labels that every generated cell has
    notes: tuple[str, ...]
    space: RealSpace


@dataclass(frozen=True)
class Evaluation:
    parts: Parts
    generated: dict[str, Score]
    floor: dict[str, Score]
    baselines: dict[str, dict[str, Score]]
    chance: dict[str, float]  # label -> share of its most frequent class
    notes: list[str]
    facts: dict[str, str]

    @property
    def rows(self) -> list[MetricRow]:
        return [
            MetricRow(k, s, self.floor.get(k), {b: v[k] for b, v in self.baselines.items() if k in v})
            for k, s in self.generated.items()
        ]

    @property
    def verdict(self) -> str:
        """One sentence; counts distribution metrics only, as every class has its own label row."""
        judged = [r for r in self.rows if r.score.group not in ("label", "reconstruction") and r.nearer is not None]
        better = sum(bool(r.nearer) for r in judged)
        words = [f"{better} of {len(judged)} metrics are nearer to the real-vs-real floor than the {POISSON} baseline"]
        for name, chance in self.chance.items():
            key = f"label_accuracy.{name}"
            words.append(
                f"kNN trained on real cells recovers {name} of {self.generated[key].value:.1%} of generated cells "
                f"({self.floor[key].value:.1%} of held-out real ones, chance {chance:.1%})"
            )
        return "; ".join(words) + "."


def evaluate(
    *,
    held_out: AnnData,
    training: AnnData,
    generated: AnnData,
    labels: Sequence[str],
    config: EvaluateConfig,
    decoded: Decoded | None = None,
) -> Evaluation:
    """Compare generated cells with held-out real cells, beside the floor and per-label baselines.

    Args:
        held_out: Real cells that no training has seen; counts over the vocabulary.
        training: Real training cells, more than held_out: the floor is cut out of them, the rest is the reference.
        generated: Generated cells, same genes; label columns may hold NaN.
        labels: obs columns, at least one; the first one is the baselines' label.
        config: n_pcs, n_top_genes, n_neighbors, transport_cells, seed.
        decoded: Held-out cells through the VAE, if there is one.
    """
    rng = np.random.default_rng(config.seed)
    parts = _parts(held_out, training, generated, labels=labels, config=config, rng=rng)
    settings = CompareSettings(config.n_neighbors, config.transport_cells, config.seed)

    def score(cells: CellSet) -> dict[str, Score]:
        return compare(parts.real, cells, reference=parts.reference, space=parts.space, settings=settings)

    held_out_labels = label_scores(
        parts.real, reference=parts.reference, space=parts.space, n_neighbors=config.n_neighbors
    )
    floor = {k: v for k, v in score(parts.floor).items() if v.group != "label"} | held_out_labels
    first = labels[0]
    fitted = LabelBaseline.fit(parts.reference.counts, parts.reference.labels[first])
    asked = {first: parts.real.labels[first]}
    baselines = {
        name: score(CellSet(draw(asked[first], rng), asked))
        for name, draw in ((POISSON, fitted.poisson), (NB, fitted.negative_binomial))
    }
    generated_scores = score(parts.generated)
    facts = _facts(parts, config)
    if decoded is not None:
        real = parts.real[decoded.rows]
        ours = reconstruction_scores(real.counts, decoded.mu, decoded.nll)
        means = fitted.mean(real.labels[first], expression.library_sizes(real.counts))
        generated_scores |= _reconstruction(ours)
        baselines[POISSON] |= _reconstruction(reconstruction_scores(real.counts, means))
        facts["reconstruction"] = (
            f"{ours.n_cells:,} held-out cells; {ours.n_genes_excluded:,} genes without variance left out"
        )
    chance = {n: _chance(parts.generated.labels[n]) for n in labels if f"label_accuracy.{n}" in generated_scores}
    return Evaluation(parts, generated_scores, floor, baselines, chance, list(parts.notes), facts)


def cell_set(adata: AnnData, labels: Sequence[str]) -> CellSet:
    """Counts and labels of an AnnData; a missing label value becomes None."""
    missing = [name for name in labels if name not in adata.obs]
    if missing:
        raise ValueError(f"obs lacks {', '.join(missing)}; it has {', '.join(adata.obs.columns) or 'no columns'}")
    columns = {n: np.array([v if isinstance(v, str) else None for v in adata.obs[n]], dtype=object) for n in labels}
    return CellSet(expression.as_counts(adata.X), columns)


def composition(cells: CellSet, labels: Sequence[str]) -> np.ndarray:
    """One key per cell out of all the labels; the same for all cells if there are no labels."""
    keys = np.full(cells.n_cells, "", dtype=object)
    for name in labels:
        keys = keys + "|" + cells.labels[name].astype(str)
    return keys


def _parts(
    held_out: AnnData,
    training: AnnData,
    generated: AnnData,
    *,
    labels: Sequence[str],
    config: EvaluateConfig,
    rng: np.random.Generator,
) -> Parts:
    _check(held_out, training, generated, labels)
    real, train, made = (cell_set(a, labels) for a in (held_out, training, generated))
    given = tuple(n for n in labels if all(isinstance(v, str) for v in made.labels[n]))
    notes = [
        f"Generated cells lack {n} in part or altogether: that label is not matched." for n in set(labels) - {*given}
    ]
    wanted = composition(real, given)
    chosen = {}
    for what, cells in (("generated", made), ("training (floor)", train)):
        selection = select_like(composition(cells, given), wanted, rng)
        chosen[what] = cells[selection.indices]
        if selection.short:
            named = ", ".join(f"{k.strip('|')} ({v})" for k, v in sorted(selection.short.items())[:SHORT_NAMED])
            more = f" and {len(selection.short) - SHORT_NAMED} more" if len(selection.short) > SHORT_NAMED else ""
            notes.append(f"Too few {what} cells to match the held-out composition, missing: {named}{more}.")
        if what != "generated":
            rest = np.setdiff1d(np.arange(train.n_cells), selection.indices)
    reference = train[rest]
    space = RealSpace.fit(reference.counts, n_top_genes=config.n_top_genes, n_pcs=config.n_pcs, seed=config.seed)
    return Parts(real, reference, chosen["training (floor)"], chosen["generated"], made, given, tuple(notes), space)


def _check(held_out: AnnData, training: AnnData, generated: AnnData, labels: Sequence[str]) -> None:
    if not labels:
        raise ValueError("evaluation needs at least one label column, for the classifier and the baselines")
    for name, adata in (("held-out", held_out), ("training", training), ("generated", generated)):
        if not adata.n_obs:
            raise ValueError(f"there are no {name} cells to evaluate with")
        if not adata.var_names.equals(held_out.var_names):
            raise ValueError(
                f"{name} cells must have the {held_out.n_vars} genes of the held-out cells in their order; got "
                f"{adata.n_vars} genes"
            )
    if training.n_obs <= held_out.n_obs:
        raise ValueError(
            f"the floor takes as many training as held-out cells ({held_out.n_obs}) and leaves none to fit on: got "
            f"{training.n_obs} training cells"
        )


def _chance(values: np.ndarray) -> float:
    known = values[[isinstance(v, str) for v in values]].astype(str)
    return float(np.unique(known, return_counts=True)[1].max() / len(known))


def _reconstruction(scores: Reconstruction) -> dict[str, Score]:
    group: Group = "reconstruction"
    out = {
        "reconstruction_gene_pearson": Score(scores.gene_pearson, "higher", 1.0, group, "Pearson per gene, on means"),
        "reconstruction_cell_pearson": Score(scores.cell_pearson, "higher", 1.0, group, "Pearson per cell, on means"),
        "reconstruction_mse": Score(scores.mse, "lower", 0.0, group, "MSE (log1p CP10k), on means"),
    }
    if scores.nll is not None:
        title = "negative log-likelihood, nats per cell over all genes"
        out = {"reconstruction_nll": Score(scores.nll, "lower", 0.0, group, title)} | out
    return out


def _facts(parts: Parts, config: EvaluateConfig) -> dict[str, str]:
    points = min(parts.real.n_cells, parts.generated.n_cells, config.transport_cells)
    return {
        "held-out real cells": f"{parts.real.n_cells:,} ({config.split})",
        "generated cells": f"{parts.generated.n_cells:,} scored of {parts.all_generated.n_cells:,} read",
        "real training cells": f"{parts.reference.n_cells:,} to fit on, {parts.floor.n_cells:,} for the floor",
        "genes": f"{parts.space.n_genes:,}, of which {len(parts.space.genes):,} most variable in PCA",
        "PCA": f"{config.n_pcs} components, {parts.space.explained.sum():.1%} of variance",
        "Wasserstein": f"exact, {points:,} cells a side",
        "label classifier": f"kNN, k = {config.n_neighbors}",
        "seed": str(config.seed),
    }
