"""The in-memory evaluation, its pictures, and the HTML report."""

import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp
from anndata import AnnData

from pipeline.job import EvaluateConfig
from pipeline.report import figures
from pipeline.report.evaluation import NB, POISSON, Decoded, evaluate
from pipeline.report.gallery import gallery
from pipeline.report.html import MAX_BYTES, MetricRow, Picture, ReportInputs, write_report
from scldm.metrics.compare import Score

CONFIG = EvaluateConfig(n_pcs=4, n_top_genes=30, n_neighbors=5, umap=False)
EVIL = "<script>alert(1)</script>"
CURVES = {
    "train_vae": [
        {"step": i, "train/loss": 5.0 - i / 10, **({"val/loss": 5.0} if i % 5 == 0 else {})} for i in range(30)
    ]
}


def toy(n: int, seed: int, *, classes: tuple[str, ...] = ("a", "b", EVIL)) -> AnnData:
    rng = np.random.default_rng(seed)
    types = np.arange(n) % len(classes)
    rate = np.where((np.arange(36) % 3) == types[:, None], 6.0, 0.5) * np.geomspace(0.1, 5, 36)
    obs = pd.DataFrame({"kind": pd.Categorical(np.array(classes)[types])}, index=[f"c{seed}-{i}" for i in range(n)])
    var = pd.DataFrame(index=[f"g{i}" for i in range(36)])
    return AnnData(sp.csr_matrix(rng.poisson(rate * rng.lognormal(0, 0.3, (n, 1)))).astype(np.float32), obs, var)


@pytest.fixture(scope="module")
def result():
    held_out = toy(60, 0)
    decoded = Decoded(np.arange(30), held_out.X[:30].toarray() + 0.1, np.full(30, 70.0))
    return evaluate(
        held_out=held_out, training=toy(240, 1), generated=toy(150, 2), labels=["kind"], config=CONFIG, decoded=decoded
    )


def test_cells_of_the_real_law_are_scored_as_good_as_real(result):
    assert result.parts.generated.n_cells == 60
    assert result.generated["gene_mean_r2"].value > 0.95
    assert result.generated["label_accuracy.kind"].value > 0.95
    assert result.chance["kind"] == pytest.approx(1 / 3)
    assert result.generated["reconstruction_nll"].value == 70
    assert (
        result.generated["reconstruction_gene_pearson"].value
        > result.baselines[POISSON]["reconstruction_gene_pearson"].value
    )
    assert set(result.baselines) == {POISSON, NB}
    assert not result.notes


def test_same_seed_same_numbers(result):
    again = evaluate(held_out=toy(60, 0), training=toy(240, 1), generated=toy(150, 2), labels=["kind"], config=CONFIG)
    assert all(result.generated[k].value == s.value for k, s in again.generated.items())


def test_missing_classes_and_missing_labels_are_said_aloud():
    lacking = evaluate(
        held_out=toy(60, 0),
        training=toy(240, 1),
        generated=toy(90, 2, classes=("a", "b")),
        labels=["kind"],
        config=CONFIG,
    )
    assert lacking.notes == [f"Too few generated cells to match the held-out composition, missing: {EVIL} (20)."]
    unlabelled = toy(90, 2)
    unlabelled.obs["kind"] = np.nan
    free = evaluate(held_out=toy(60, 0), training=toy(240, 1), generated=unlabelled, labels=["kind"], config=CONFIG)
    assert "lack kind" in free.notes[0]
    assert "label_accuracy.kind" not in free.generated


def test_bad_inputs_are_named():
    with pytest.raises(ValueError, match=r"generated cells must have the 36 genes .* got 30"):
        evaluate(
            held_out=toy(60, 0), training=toy(240, 1), generated=toy(60, 2)[:, :30], labels=["kind"], config=CONFIG
        )
    with pytest.raises(ValueError, match="as many training as held-out"):
        evaluate(held_out=toy(60, 0), training=toy(50, 1), generated=toy(60, 2), labels=["kind"], config=CONFIG)
    with pytest.raises(ValueError, match="obs lacks donor; it has kind"):
        evaluate(held_out=toy(60, 0), training=toy(240, 1), generated=toy(60, 2), labels=["donor"], config=CONFIG)


def test_report_is_one_small_file_that_escapes_labels_and_needs_no_network(result, tmp_path):
    pictures = list(gallery(result, CONFIG, CURVES))
    assert [p.name for p in pictures] == ["embedding", "genes", "cells", "labels_kind", "training"]
    assert all(p.png.startswith(b"\x89PNG") for p in pictures)
    stage = {"stage": "ingest", "version": "abc", "seconds": "1.0", "finished": "now", "detail": {"config": EVIL}}
    inputs = ReportInputs(
        title="t", verdict=f"{result.verdict} {EVIL}", notes=[EVIL], facts=result.facts, rows=result.rows,
        baseline_names=list(result.baselines), pictures=pictures, provenance=[stage], reproduce=f"run {EVIL}",
    )  # fmt: skip
    write_report(tmp_path / "report.html", inputs)
    text = (tmp_path / "report.html").read_text()
    assert "<script" not in text
    assert "&lt;script&gt;" in text
    assert "http" not in text
    assert len(text) < MAX_BYTES


def test_a_report_above_its_limit_is_refused(tmp_path):
    big = Picture("big", "big", "", b"\x00" * MAX_BYTES)
    empty = ReportInputs("t", "v", [], {}, [], [], [big], [], "")
    with pytest.raises(ValueError, match=r"big 5,000,000"):
        write_report(tmp_path / "r.html", empty)


def test_nearer_means_distance_from_the_floor_to_either_side():
    score = lambda v: Score(v, "lower", 0.0, "distance", "d")  # noqa: E731
    row = lambda v: MetricRow("d", score(v), score(1.0), {"b": score(3.0)})  # noqa: E731
    assert [row(v).nearer for v in (1.0, 2.0, 0.0, 4.0)] == [True, True, True, False]
    assert row(2.0).position == 0.5
    assert MetricRow("d", score(1.0)).nearer is None


def test_a_class_keeps_its_colour_whatever_the_order():
    assert figures.class_colors(["b", "a"]) == figures.class_colors(["a", "b"])
    assert figures.class_colors([f"{i:02}" for i in range(30)])["25"] == figures.UNLABELLED


@pytest.mark.integration  # numba compiles for some 15 s
def test_umap_puts_both_kinds_into_one_map():
    real, generated = np.random.default_rng(0).normal(size=(2, 60, 5))
    a, b = figures.umap_coordinates(real, generated, seed=0)
    assert a.shape == b.shape == (60, 2)
    assert np.isfinite(a).all()
