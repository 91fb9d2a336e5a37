"""Assign cells their roles in an evaluation, subsampled to the number and composition of the held-out ones.

Otherwise a difference in sample size or composition would count as a defect of the cells.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from anndata import AnnData

from pipeline.config.job import EvaluateConfig
from scldm.metrics.baselines import Selection, select_like
from scldm.metrics.cell_set import CellSet, class_text, joined
from scldm.metrics.distribution.projection import RealSpace
from scldm.metrics.from_anndata import EvaluationError, cell_set

MAX_NAMED = 5  # classes named in a note
MIN_CELLS = 16  # of each side: halves of fewer have too few neighbors and folds


@dataclass(frozen=True)
class EvaluationCells:
    """Cells by their role in an evaluation."""

    real: CellSet  # held out
    reference: CellSet  # training cells to fit label classifiers and baselines, and by default the PCA space
    floor: CellSet  # other training cells, as many as held out
    generated: CellSet  # as many as held out, of the same composition
    all_generated: CellSet
    extra: Mapping[str, CellSet]  # further candidates, subsampled like the generated cells
    given: tuple[str, ...]  # labels that every generated cell has
    notes: tuple[str, ...]
    space: RealSpace
    rows: np.ndarray  # positions of `real` among the held-out cells
    unseen: tuple[str, ...]  # held-out combinations of `given` that no training cell has


def select_cells(
    held_out: AnnData,
    training: AnnData,
    generated: AnnData,
    extra: Mapping[str, AnnData],
    *,
    labels: Sequence[str],
    config: EvaluateConfig,
    rng: np.random.Generator,
) -> EvaluationCells:
    """Assign every cell its role. Classes with too few cells are named in the notes.

    No training cell can be the floor of a combination that was held out whole: one half of its cells is, for the other
    half.

    Arguments are those of `pipeline.report.evaluation.evaluate`.
    """
    _check(held_out, {"training": training, "generated": generated, **extra}, labels)
    everything, train, made = (cell_set(a, labels) for a in (held_out, training, generated))
    others = {name: cell_set(a, labels) for name, a in extra.items()}
    given = tuple(n for n in labels if all(isinstance(v, str) for v in made.labels[n]))
    notes = [
        f"Generated cells lack {n} in part or altogether: that label is not matched." for n in set(labels) - {*given}
    ]
    _check_extra(others, given)
    unseen, rows, other_half = _halves_of_unseen(everything.crossed(given), train.crossed(given), rng)
    real = everything[rows]
    wanted = real.crossed(given)
    seen = wanted[~np.isin(wanted.astype(str), unseen)]
    _check_training(train, len(seen))
    chosen, selections = {}, {}
    asked = {"generated": (made, wanted), "training (floor)": (train, seen)}
    for role, (cells, like) in {**asked, **{name: (cells, wanted) for name, cells in others.items()}}.items():
        selection = select_like(cells.crossed(given), like, rng)
        chosen[role], selections[role] = cells[selection.indices], selection
        notes += _missing_cells(role, selection)
    notes += _unseen_note(unseen)
    floor = joined(chosen.pop("training (floor)"), everything[other_half])
    _check_numbers(real, {**chosen, "floor": floor})
    rest = np.setdiff1d(np.arange(train.n_cells), selections["training (floor)"].indices)
    reference = train[rest]
    space = fit_space(real if config.space_from == "held_out" else reference, config)
    generated_like = chosen.pop("generated")
    return EvaluationCells(
        real, reference, floor, generated_like, made, chosen, given, tuple(notes), space, rows, tuple(unseen)
    )


def _halves_of_unseen(
    held_out: np.ndarray, known: np.ndarray, rng: np.random.Generator
) -> tuple[list[str], np.ndarray, np.ndarray]:
    """Return the classes that no training cell has, the rows to compare with, and those of the other halves.

    Args:
        held_out: Class of each held-out cell, (n,).
        known: Class of each training cell.
        rng: Draws the halves.
    """
    keys = held_out.astype(str)
    unseen = sorted(set(keys) - set(known.astype(str)))
    other: list[np.ndarray] = [np.zeros(0, dtype=np.int64)]
    for name in unseen:
        here = rng.permutation(np.flatnonzero(keys == name))
        other.append(here[: len(here) // 2])
    other_half = np.sort(np.concatenate(other))
    return unseen, np.setdiff1d(np.arange(len(keys)), other_half), other_half


def _unseen_note(unseen: Sequence[str]) -> list[str]:
    if not unseen:
        return []
    named = ", ".join(class_text(name) for name in unseen[:MAX_NAMED])
    more = f" and {len(unseen) - MAX_NAMED} more" if len(unseen) > MAX_NAMED else ""
    return [
        f"No training cell has {named}{more}: half of their held-out cells are the floor, generated cells are compared "
        "with the other half."
    ]


def fit_space(cells: CellSet, config: EvaluateConfig) -> RealSpace:
    """Fit the PCA space of the distances."""
    return RealSpace.fit(
        cells.counts, n_top_genes=config.n_top_genes, n_pcs=config.n_pcs, seed=config.seed, gene_rule=config.gene_rule
    )


def _missing_cells(role: str, selection: Selection) -> list[str]:
    if not selection.short:
        return []
    named = ", ".join(f"{class_text(k)} ({v})" for k, v in sorted(selection.short.items())[:MAX_NAMED])
    more = f" and {len(selection.short) - MAX_NAMED} more" if len(selection.short) > MAX_NAMED else ""
    return [f"Too few {role} cells to match the held-out composition, missing: {named}{more}."]


def _check(held_out: AnnData, others: Mapping[str, AnnData], labels: Sequence[str]) -> None:
    if not labels:
        raise EvaluationError("evaluation needs at least one label column, for the classifier and the baselines")
    for name, adata in {"held-out": held_out, **others}.items():
        if not adata.n_obs:
            raise EvaluationError(f"there are no {name} cells to evaluate with")
        if not adata.var_names.equals(held_out.var_names):
            raise EvaluationError(
                f"{name} cells must have the {held_out.n_vars} genes of the held-out cells in their order; got "
                f"{adata.n_vars} genes"
            )


def _check_training(train: CellSet, n_floor: int) -> None:
    if train.n_cells <= n_floor:
        raise EvaluationError(
            f"the floor takes as many training as held-out cells ({n_floor}) and leaves none to fit on: got "
            f"{train.n_cells} training cells"
        )


def _check_numbers(real: CellSet, chosen: Mapping[str, CellSet]) -> None:
    few = {name: c.n_cells for name, c in {"held-out": real, **chosen}.items() if c.n_cells < MIN_CELLS}
    if few:
        counts = ", ".join(f"{n} {name}" for name, n in few.items())
        raise EvaluationError(
            f"an evaluation needs at least {MIN_CELLS} cells on each side, of the classes of the held-out ones; "
            f"there are {counts}"
        )


def _check_extra(extra: Mapping[str, CellSet], given: Sequence[str]) -> None:
    bad = {
        name: [label for label in given if not all(isinstance(v, str) for v in cells.labels[label])]
        for name, cells in extra.items()
    }
    if any(bad.values()):
        lacking = "; ".join(f"{name} lacks {', '.join(found)}" for name, found in bad.items() if found)
        raise EvaluationError(
            f"extra candidates need the labels that the generated cells have, for every cell: {lacking}"
        )
