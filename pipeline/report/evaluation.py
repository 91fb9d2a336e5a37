"""Evaluate generated cells against held-out real ones: scores, intervals, baselines and a verdict, all in memory.

If generated cells hold log1p CP10k values (a Gaussian head), everything is compared on that scale. Scores that only
counts have are left out and named, with the reason.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
import scipy.sparse as sp
from anndata import AnnData

from pipeline.config.job import EvaluateConfig
from pipeline.report.cells import EvaluationCells, fit_space, select_cells
from pipeline.report.combinations import Combinations, combination_notes, score_combinations, true_means
from pipeline.report.rows import MetricRow
from pipeline.report.verdict import verdict
from scldm.metrics.baselines import LabelBaseline, Pools, shuffled
from scldm.metrics.cell_set import CellSet, class_text
from scldm.metrics.compare import ONLY_OF_COUNTS, Compared, CompareSettings, Comparison
from scldm.metrics.conditional import ClassTable, ConditionalSettings
from scldm.metrics.distribution.true_process import TrueProcess, TruthScores, label_nll, truth_scores
from scldm.metrics.from_anndata import EvaluationError, cell_set
from scldm.metrics.genes import expression
from scldm.metrics.genes.reconstruction import reconstruction_table
from scldm.metrics.labels import labelled
from scldm.metrics.resampling import Halves
from scldm.metrics.score import Score, checked
from scldm.metrics.streaming import StreamedCells, composition_weights, stream, streamed_scores

POISSON, NB, COPIES, SHUFFLED = "per-label Poisson", "per-label NB", "training copies", "shuffled genes"
BASELINES = (POISSON, NB, COPIES, SHUFFLED)
RESERVED = (
    *BASELINES,
    "generated",
    "floor",
    "training",
    "training (floor)",
    "held-out",
)  # names that an extra candidate may not have
HALVES = 2  # random stream for the halves of reconstructed cells; `compare` uses others


@dataclass(frozen=True)
class Decoded:
    """Held-out cells after encoding and decoding by the VAE."""

    rows: np.ndarray  # (n,) positions among the held-out cells
    mu: np.ndarray  # (n, g) mean counts; without draws, means of log1p CP10k
    nll: np.ndarray | None = None  # (n,) nats summed over genes; None: a Gaussian head
    draws: sp.csr_matrix | None = None  # (n, g) counts drawn from the decoded distribution; None: a Gaussian head


@dataclass(frozen=True)
class Evaluation:
    """The result of an evaluation."""

    parts: EvaluationCells
    generated: dict[str, Score]
    floor: dict[str, Score]
    baselines: dict[str, dict[str, Score]]  # the four of BASELINES, then the extra candidates
    classes: dict[str, dict[str, ClassTable]]  # candidate -> label or crossing of labels
    chance: dict[str, float]  # label -> share of its most frequent class
    notes: list[str]
    facts: dict[str, str]
    comparison: Comparison
    left_out: dict[str, str]  # scores that cells without counts do not have -> the reason
    combinations: Combinations  # of labels, that no training cell has
    truth: TruthScores | None = None  # figures against the process of synthetic cells, if it is known
    changed: bool = False  # whether the generated cells are measured ones whose counts were changed

    @property
    def rows(self) -> list[MetricRow]:
        """One row per score of the generated cells."""
        return [
            MetricRow(k, s, self.floor.get(k), {b: v[k] for b, v in self.baselines.items() if k in v})
            for k, s in self.generated.items()
        ]

    @property
    def verdict(self) -> str:
        """The conclusion in a few sentences; differences are reported only if the intervals allow it."""
        yardsticks = [NB, POISSON, SHUFFLED, *(name for name in self.baselines if name not in BASELINES)]
        return verdict(self.rows, yardsticks, self.chance, self.truth, changed=self.changed)


def evaluate(
    *,
    held_out: AnnData,
    training: AnnData,
    generated: AnnData,
    labels: Sequence[str],
    config: EvaluateConfig,
    decoded: Decoded | None = None,
    extra: Mapping[str, AnnData] | None = None,
    streamed: StreamedCells | None = None,
    truth: pd.DataFrame | None = None,
    process: TrueProcess | None = None,
) -> Evaluation:
    """Score generated cells against held-out real cells, and likewise the floor, baselines and other candidates.

    Args:
        held_out: Real cells that were not trained on; counts over the vocabulary.
        training: Real training cells, more than held_out: the floor is drawn from them, the rest is the reference.
        generated: Generated cells, same genes; label columns may hold NaN.
        labels: obs columns, at least one. Baselines are fitted to each combination, rare ones to the first label.
        config: Settings of the scores.
        decoded: Held-out cells that the VAE has reconstructed, if there is a VAE.
        extra: Cells of other models by name, same genes and labels; scored as the generated ones.
        streamed: Statistics of all generated cells, if `generated` is a sample of them.
        truth: What combinations of synthetic labels have on average, see `IngestedDataset.truth`.
        process: What is known of the process that synthetic held-out cells were drawn from, in their order.

    Raises:
        EvaluationError: The inputs do not fit together.
        ValueError: A score does not exist for these cells.
        FloatingPointError: Scores are NaN or infinite; the message names them.
    """
    rng = np.random.default_rng(config.seed)
    extra = extra or {}
    taken = [name for name in extra if name in RESERVED]
    if taken:
        raise EvaluationError(f"extra candidates need names of their own; {', '.join(taken)} is taken")
    parts = select_cells(held_out, training, generated, extra, labels=labels, config=config, rng=rng)
    counted = parts.generated.counted and all(cells.counted for cells in parts.extra.values())
    comparison = Comparison(
        parts.real, parts.reference, parts.space, compare_settings(config, parts.given), labels=parts.given,
        training_space=None if config.space_from == "training" else fit_space(parts.reference, config),
        counted=counted,
    )  # fmt: skip
    pools = Pools.like(parts.reference, parts.real, labels)
    fitted = LabelBaseline.from_pools(parts.reference.counts, pools.members)
    candidates = {"generated": parts.generated, "floor": parts.floor, **_baselines(parts, pools, fitted, rng)}
    found = comparison.all_scores(candidates | dict(parts.extra))
    scores = _with_label_floor(found, comparison)
    facts = _facts(parts, config, counted=counted)
    if decoded is not None:
        _add_reconstruction(scores, facts, parts, decoded, (pools, fitted), config, rng)
    if streamed is not None:
        _add_streamed(scores, facts, parts, streamed)
    nearness = _beside_the_process(process, parts, candidates, (pools, fitted), decoded, scores["generated"])
    left_out = _left_out_scores(counted, decoded, streamed)
    control, made = config.control or {}, parts.generated
    combinations = score_combinations(
        parts, cell_set(held_out, labels), cell_set(training, labels), control=control, genes=_gene_names(held_out),
        seed=config.seed, truth=true_means(truth, parts.given, control, list(held_out.var_names)),
    )  # fmt: skip
    notes = [
        *parts.notes, *combination_notes(combinations, len(parts.unseen), control), *_scale_notes(left_out),
        *_left_out(found["generated"]),
    ]  # fmt: skip
    chance = {n: _chance(made.labels[n]) for n in labels if f"label_accuracy.{n}" in scores["generated"]}
    return Evaluation(
        parts, scores.pop("generated"), scores.pop("floor"), scores, {k: v.classes for k, v in found.items()}, chance,
        notes, facts, comparison, left_out, combinations, nearness,
    )  # fmt: skip


def _gene_names(cells: AnnData) -> list[str]:
    """Return the names of genes for readers: `feature_name` where var has it, else the ids."""
    names = cells.var.get("feature_name", cells.var_names)
    return [str(name) for name in names]


def compare_settings(config: EvaluateConfig, given: Sequence[str]) -> CompareSettings:
    """Return the settings of the comparison from those of a job.

    Args:
        given: Labels that all generated cells have.

    Raises:
        EvaluationError: A control names another label.
    """
    control = config.control or {}
    unknown = sorted(set(control) - {*given})
    if unknown:
        raise EvaluationError(
            f"evaluate.control names {', '.join(unknown)}, which is no label that all generated cells have; there are "
            f"{', '.join(given) or 'none'}"
        )
    conditional = ConditionalSettings(config.min_class_cells, config.transport_cells, config.class_average, control)
    return CompareSettings(
        config.n_neighbors, config.transport_cells, config.seed, conditional, config.resamples, config.refits
    )


def _baselines(
    parts: EvaluationCells, pools: Pools, fitted: LabelBaseline, rng: np.random.Generator
) -> dict[str, CellSet]:
    """Return the cells that each baseline generates for the labels of the held-out cells."""
    reference = parts.reference.counts
    counts = {
        POISSON: fitted.poisson(pools.wanted, rng),
        NB: fitted.negative_binomial(pools.wanted, rng),
        COPIES: reference[pools.draw(rng)],
        SHUFFLED: shuffled(reference[pools.draw_each_once(rng)], pools.wanted, rng),
    }
    return {name: CellSet(x, parts.real.labels) for name, x in counts.items()}


def _beside_the_process(
    process: TrueProcess | None,
    parts: EvaluationCells,
    candidates: Mapping[str, CellSet],
    baseline: tuple[Pools, LabelBaseline],
    decoded: Decoded | None,
    generated: Mapping[str, Score],
) -> TruthScores | None:
    """Score generated and held-out cells, and the VAE, against the process of synthetic cells, if it is known."""
    if process is None or not candidates["generated"].counted:
        return None
    of_real = TrueProcess(process.expected[parts.rows], process.theta, process.fresh)
    pools, fitted = baseline
    rows = np.arange(parts.real.n_cells) if decoded is None else _of_rows(decoded, parts.rows).rows
    nll = {f"under a {NB}": label_nll(fitted, pools.wanted[rows], parts.real.counts[rows])}
    if "reconstruction_nll" in generated:
        nll["the VAE"] = generated["reconstruction_nll"].value
    compared = {"generated": candidates["generated"], "held-out": parts.real, NB: candidates[NB]}
    return truth_scores(of_real, parts.real, compared, parts.space, nll=nll, rows=rows)


def _with_label_floor(found: Mapping[str, Compared], comparison: Comparison) -> dict[str, dict[str, Score]]:
    """Return scores by candidate; the floor's label scores are those of the held-out cells themselves."""
    scores = {name: dict(compared.scores) for name, compared in found.items()}
    own = {k: v for k, v in scores["floor"].items() if v.group != "label"}
    scores["floor"] = own | comparison.real_label_scores()
    return scores


def _add_reconstruction(
    scores: dict[str, dict[str, Score]],
    facts: dict[str, str],
    parts: EvaluationCells,
    decoded: Decoded,
    baseline: tuple[Pools, LabelBaseline],
    config: EvaluateConfig,
    rng: np.random.Generator,
) -> None:
    """Add reconstruction scores of the VAE, and of the baselines' means and draws at each cell's own library size."""
    decoded = _of_rows(decoded, parts.rows)
    real = parts.real[decoded.rows]
    halves = Halves.draw(real.crossed(parts.given), config.resamples, np.random.default_rng((config.seed, HALVES)))
    counted = decoded.draws is not None
    table = lambda mu, draws, nll=None, counted=True: reconstruction_table(  # noqa: E731
        real.counts, mu, halves, refits=config.refits, nll=nll, draws=draws, counted=counted
    )
    pools, fitted = baseline
    classes, sizes = pools.wanted[decoded.rows], expression.library_sizes(real.counts)
    means = fitted.mean(classes, sizes)
    scores["generated"] |= checked(table(decoded.mu, decoded.draws, decoded.nll, counted), "the VAE")
    scores[POISSON] |= checked(table(means, fitted.poisson(classes, rng, sizes)), POISSON)
    scores[NB] |= checked(table(means, fitted.negative_binomial(classes, rng, sizes)), NB)
    facts["reconstruction"] = f"{real.n_cells:,} held-out cells; genes and cells without variance have no correlation"


def _of_rows(decoded: Decoded, rows: np.ndarray) -> Decoded:
    """Return the reconstructed cells that are among some rows of the held-out cells, with their places in these."""
    kept = np.flatnonzero(np.isin(decoded.rows, rows))
    return Decoded(
        np.searchsorted(rows, decoded.rows[kept]),
        decoded.mu[kept],
        None if decoded.nll is None else decoded.nll[kept],
        None if decoded.draws is None else decoded.draws[kept],
    )


def _add_streamed(
    scores: dict[str, dict[str, Score]], facts: dict[str, str], parts: EvaluationCells, streamed: StreamedCells
) -> None:
    """Add scores of all generated cells; their floor is all training cells that were read, weighted the same way."""
    real = parts.real
    moments = expression.gene_moments(expression.chunks(real.counts))
    own = (moments, expression.library_sizes(real.counts), expression.genes_per_cell(real.counts))
    train = [parts.reference, parts.floor]
    classes = np.concatenate([cells.crossed(parts.given) for cells in train])
    weights, _ = composition_weights(classes, real.crossed(parts.given))
    counted = streamed.counted
    chunks = (c for cells in train for c in (expression.chunks(cells.counts) if counted else cells.log_chunks()))
    scores["generated"] |= streamed_scores(*own, streamed)
    scores["floor"] |= streamed_scores(*own, stream(chunks, weights, counted=counted))
    facts["streamed"] = (
        f"all {streamed.n_cells:,} generated cells, weighted to the held-out composition; floor: {len(weights):,} "
        "training cells, the same way"
    )


def _left_out_scores(counted: bool, decoded: Decoded | None, streamed: StreamedCells | None) -> dict[str, str]:
    """Return the scores that cells or a decoder without counts do not have, with the reasons."""
    found = {} if counted else dict(ONLY_OF_COUNTS)
    if streamed is not None and not streamed.counted:
        kept = ("library_size_ks", "genes_per_cell_ks", "zero_fraction_difference", "gene_zero_fraction_r2")
        found |= {f"streamed_{name}": ONLY_OF_COUNTS[name] for name in kept}
    if decoded is not None and decoded.draws is None:
        found["reconstruction_nll"] = "counts have no likelihood under a Gaussian head; reconstruction_mse is its loss"
        of_draws = ("gene_pearson_draws", "cell_pearson_draws", "mse_draws", "zero_accuracy")
        found |= {f"reconstruction_{name}": "a Gaussian head draws no counts" for name in of_draws}
    return found


def _scale_notes(left_out: Mapping[str, str]) -> list[str]:
    """Return notes on the scale of the comparison and on the scores that are left out."""
    if not left_out:
        return []
    reasons: dict[str, list[str]] = {}
    for name, reason in left_out.items():
        reasons.setdefault(reason, []).append(name)
    named = "; ".join(f"{', '.join(names)} ({reason})" for reason, names in reasons.items())
    return [
        "Cells hold log1p CP10k values of a Gaussian head: real cells and baselines are transformed to log1p CP10k, "
        "and all are compared on that scale.",
        f"Left out: {named}.",
    ]


def _left_out(generated: Compared) -> list[str]:
    """Return notes that name classes with too few cells for scores of their own."""
    notes = []
    for name, table in generated.classes.items():
        if table.left_out:
            named = [f"{class_text(c)} ({n}, {m})" for c, (n, m) in list(table.left_out.items())[:8]]
            more = f" and {len(table.left_out) - 8} more" if len(table.left_out) > 8 else ""
            notes.append(
                f"Too few cells for scores within classes of {name} (real, generated): {', '.join(named)}{more}."
            )
    return notes


def _chance(values: np.ndarray) -> float:
    known = values[labelled(values)].astype(str)
    return float(np.unique(known, return_counts=True)[1].max() / len(known))


def _facts(parts: EvaluationCells, config: EvaluateConfig, *, counted: bool) -> dict[str, str]:
    points = min(parts.real.n_cells, parts.generated.n_cells, config.transport_cells)
    fitted_on = "held-out cells" if config.space_from == "held_out" else "training cells"
    rule = {"variance": "most variable (log1p CP10k)", "seurat_v3": "most variable (seurat_v3)"}[config.gene_rule]
    control = ", ".join(f"{k} = {v}" for k, v in (config.control or {}).items())
    return {
        "held-out real cells": f"{parts.real.n_cells:,} ({config.split})",
        "generated cells": f"{parts.generated.n_cells:,} scored of {parts.all_generated.n_cells:,} read",
        "real training cells": f"{parts.reference.n_cells:,} to fit on, {parts.floor.n_cells:,} for the floor",
        "genes": f"{parts.space.n_genes:,}, of which {len(parts.space.genes):,} {rule} in PCA",
        "PCA": f"{config.n_pcs} components fitted on {fitted_on}, {parts.space.explained.sum():.1%} of variance",
        "Wasserstein": f"exact, {points:,} cells a side; within classes at most {config.transport_cells:,}",
        "label classifiers": f"kNN, k = {config.n_neighbors}; logistic regression",
        "within classes": (
            f"of {config.min_class_cells} real and generated cells or more; mean "
            + {"cells": "by number of real cells", "classes": "over classes alike"}[config.class_average]
        ),
        "intervals": (
            f"95 %, from {config.resamples} random halves of the cells ({config.refits} where a score is solved anew)"
        ),
        "log fold changes": f"against {control or 'all other cells'}" + ("" if counted else "; of mean log1p CP10k"),
        **({} if counted else {"scale": "log1p CP10k: values of a Gaussian head, which draws no counts"}),
        "protocol": PROTOCOL_FACTS[config.protocol],
        "seed": str(config.seed),
    }


PROTOCOL_FACTS = {
    "default": "default: genes and PCA from training cells",
    "cfgen": "cfgen: as CFGen's evaluation; its rows are conditional_w1, conditional_w2 and conditional_mmd2",
    "paper": (
        "paper: W2, MMD², Fréchet, 1-NN accuracy, precision and recall on variable genes are named in the paper; its "
        "script, number of genes, components and cells are not published, so cfgen's are taken. Not known either: k of "
        "precision and recall, whether W2 is per class."
    ),
}
