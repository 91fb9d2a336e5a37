"""Held-out combinations: the evaluation ends, and scores them beside the answers that are free."""

from __future__ import annotations

import csv
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp
from anndata import AnnData

from pipeline.config.job import EvaluateConfig
from pipeline.report.combinations import GENERATED, combination_means, true_scores
from pipeline.report.evaluation import Decoded, Evaluation, evaluate
from pipeline.report.outputs import write_tables
from scldm.metrics.from_anndata import EvaluationError
from scldm.metrics.perturbation.combinations import FLOOR
from scldm.metrics.perturbation.free_answers import CONTROL, FREE_ANSWERS, SHIFT

GENES, CELLS = 40, 40
EVIL = "<b>c</b>"
CONFIG = EvaluateConfig(
    n_pcs=4, n_top_genes=30, n_neighbors=5, min_class_cells=15, resamples=10, refits=5, umap=False,
    control={"drug": "ctrl"},
)  # fmt: skip
LABELS = ["type", "drug"]
UNSEEN = (EVIL, "high")


def drawn(pairs: list[tuple[str, str]], n: int, seed: int) -> AnnData:
    """n cells of each pair: a type has a profile, and a drug multiplies the same genes in all of them."""
    fixed = np.random.default_rng(0)
    profile = {t: fixed.normal(0, 1, GENES) for t in ("a", "b", EVIL)}
    effect = {"ctrl": np.zeros(GENES), "low": fixed.normal(0, 0.5, GENES), "high": fixed.normal(0, 1, GENES)}
    rng = np.random.default_rng(seed)
    each = [pair for pair in pairs for _ in range(n)]
    rate = np.stack([np.exp(profile[t] + effect[d]) for t, d in each]) * rng.lognormal(0, 0.3, (len(each), 1)) * 4
    obs = pd.DataFrame(each, columns=LABELS, index=[f"c{seed}-{i}" for i in range(len(each))])
    var = pd.DataFrame({"feature_name": [f"name{i}" for i in range(GENES)]}, index=[f"g{i}" for i in range(GENES)])
    return AnnData(sp.csr_matrix(rng.poisson(rate)).astype(np.float32), obs, var)


ALL = [(t, d) for t in ("a", "b", EVIL) for d in ("ctrl", "low", "high")]
KNOWN = [pair for pair in ALL if pair != UNSEEN]


@pytest.fixture(scope="module")
def result() -> Evaluation:
    """Return an evaluation of cells of the true law, of one combination that nobody trained on."""
    held_out = drawn([UNSEEN], CELLS, 1)
    rows = np.arange(0, CELLS, 2)
    means = held_out.X[rows].toarray() + 0.1
    decoded = Decoded(rows, means, held_out.X[rows].sum(1).A1 * 1.0, sp.csr_matrix(np.round(means)))
    return evaluate(
        held_out=held_out, training=drawn(KNOWN, CELLS, 2), generated=drawn([UNSEEN], 60, 3), labels=LABELS,
        config=CONFIG, decoded=decoded,
    )  # fmt: skip


def test_half_of_the_held_out_cells_are_the_floor_of_the_other_half(result: Evaluation) -> None:
    parts = result.parts
    assert parts.unseen == (f"{EVIL}\x1fhigh",)
    assert parts.real.n_cells == parts.floor.n_cells == parts.generated.n_cells == CELLS // 2
    held_out = drawn([UNSEEN], CELLS, 1)
    assert (parts.real.counts != held_out.X[parts.rows]).nnz == 0
    other = np.setdiff1d(np.arange(CELLS), parts.rows)
    assert (parts.floor.counts != held_out.X[other]).nnz == 0
    assert any("half of their held-out cells are the floor" in note for note in result.notes)


def test_cells_of_the_true_law_are_nearer_than_every_free_answer(result: Evaluation) -> None:
    (one,) = result.combinations.scored
    assert (one.context, one.treatment) == UNSEEN
    assert set(one.scores) == {GENERATED, FLOOR, *FREE_ANSWERS}
    energy = {name: scores["energy"] for name, scores in one.scores.items()}
    assert energy[GENERATED] < min(energy[name] for name in FREE_ANSWERS)
    assert one.scores[GENERATED]["delta_pearson"] > one.scores[SHIFT]["delta_pearson"] > 0.5
    assert one.scores[CONTROL]["delta_pearson"] == 0
    assert any("better than the best free answer in 1 of 1 by energy distance" in note for note in result.notes)


def test_reconstructed_cells_are_matched_with_the_half_that_is_compared(result: Evaluation) -> None:
    even = np.isin(result.parts.rows, np.arange(0, CELLS, 2))
    own = result.parts.real.counts[np.flatnonzero(even)].sum(1)
    assert result.generated["reconstruction_nll"].value == pytest.approx(own.mean())


def test_scores_are_written_to_a_table_and_a_page_that_escapes_names(result: Evaluation, tmp_path: Path) -> None:
    write_tables(tmp_path, result)
    rows = list(csv.DictReader((tmp_path / "combinations.csv").open()))
    assert {row["answer"] for row in rows} == {GENERATED, FLOOR, *FREE_ANSWERS}
    energy = next(r for r in rows if (r["answer"], r["measure"]) == (GENERATED, "energy"))
    assert float(energy["low"]) <= float(energy["value"]) <= float(energy["high"])
    page = (tmp_path / "combinations.html").read_text()
    assert "&lt;b&gt;c&lt;/b&gt; + high" in page
    assert EVIL not in page
    assert "name" in page
    assert page.count("<img") == 1
    means = combination_means(result.combinations)
    assert means[GENERATED]["energy"] == pytest.approx(float(energy["value"]))


def test_synthetic_cells_show_the_true_shift_beside_measured_and_generated(tmp_path: Path) -> None:
    held_out, training, made = (drawn(pairs, n, seed) for pairs, n, seed in (([UNSEEN], CELLS, 1), (KNOWN, CELLS, 2),
                                                                             ([UNSEEN], 60, 3)))  # fmt: skip
    named = {"type": "cell_type", "drug": "treatment"}
    for cells in (held_out, training, made):
        cells.obs = cells.obs.rename(columns=named)
    rows = []
    for pair in ALL:
        x = drawn([pair], 3_000, 4).X.toarray()
        log = np.log1p(x / np.maximum(x.sum(1, keepdims=True), 1) * 1e4).mean(0)
        rows += [{"cell_type": pair[0], "treatment": pair[1], "feature_id": f"g{i}", "mean_log": v} for i, v in
                 enumerate(log)]  # fmt: skip
    found = evaluate(
        held_out=held_out, training=training, generated=made, labels=list(named.values()),
        config=CONFIG.model_copy(update={"control": {"treatment": "ctrl"}}),
        truth=pd.DataFrame(rows).sample(frac=1, random_state=0),
    )  # fmt: skip
    (one,) = found.combinations.scored
    table = pd.DataFrame(rows).pivot(index=["cell_type", "treatment"], columns="feature_id", values="mean_log")
    true = (table.loc[UNSEEN] - table.loc[EVIL, "ctrl"])[list(held_out.var_names)].to_numpy()
    np.testing.assert_allclose(found.combinations.true_shift[UNSEEN], true)
    scores = true_scores(found.combinations, one)
    assert set(scores) == {"measured", GENERATED, *FREE_ANSWERS}
    assert scores["measured"]["true_delta_pearson"] > 0.9
    assert scores[GENERATED]["true_delta_pearson"] > scores[SHIFT]["true_delta_pearson"]
    assert scores[CONTROL]["true_mae"] == pytest.approx(np.abs(true).mean())
    write_tables(tmp_path, found)
    assert "against the true shift" in (tmp_path / "combinations.html").read_text()
    listed = {(r["answer"], r["measure"]) for r in csv.DictReader((tmp_path / "combinations.csv").open())}
    assert ("measured", "true_delta_pearson") in listed


def test_without_a_control_the_notes_say_how_to_name_it() -> None:
    config = CONFIG.model_copy(update={"control": None})
    found = evaluate(
        held_out=drawn([UNSEEN], CELLS, 1), training=drawn(KNOWN, CELLS, 2), generated=drawn([UNSEEN], 60, 3),
        labels=LABELS, config=config,
    )  # fmt: skip
    assert not found.combinations.scored
    assert any("evaluate.control={LABEL: CLASS}" in note for note in found.notes)


def test_combinations_without_a_free_answer_are_named_with_the_reason() -> None:
    training = drawn([(EVIL, "ctrl"), ("a", "ctrl"), ("a", "low"), ("b", "ctrl")], CELLS, 2)
    found = evaluate(
        held_out=drawn([UNSEEN], CELLS, 1), training=training, generated=drawn([UNSEEN], 60, 3), labels=LABELS,
        config=CONFIG,
    )  # fmt: skip
    assert "was measured beside 'ctrl' in no context" in found.combinations.left_out[f"{EVIL} + high"]
    assert any(note.startswith("Not scored as a combination") for note in found.notes)


def test_seen_classes_keep_training_cells_as_their_floor() -> None:
    """A test split may hold cells of known combinations beside a combination that was held out whole."""
    held_out = drawn([UNSEEN, ("a", "low")], CELLS, 1)
    found = evaluate(
        held_out=held_out, training=drawn(KNOWN, CELLS + 5, 2), generated=drawn([UNSEEN, ("a", "low")], 60, 3),
        labels=LABELS, config=CONFIG,
    )  # fmt: skip
    numbers = pd.Series(found.parts.real.crossed(LABELS)).value_counts().to_dict()
    assert numbers == {f"{EVIL}\x1fhigh": CELLS // 2, "a\x1flow": CELLS}
    assert pd.Series(found.parts.floor.crossed(LABELS)).value_counts().to_dict() == numbers
    assert [one.treatment for one in found.combinations.scored] == ["high"]


def test_too_few_held_out_cells_for_two_halves_are_an_error() -> None:
    with pytest.raises(EvaluationError, match="10 held-out"):
        evaluate(
            held_out=drawn([UNSEEN], 20, 1), training=drawn(KNOWN, CELLS, 2), generated=drawn([UNSEEN], 60, 3),
            labels=LABELS, config=CONFIG,
        )  # fmt: skip
