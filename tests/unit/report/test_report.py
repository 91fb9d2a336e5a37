"""The in-memory evaluation, its pictures, and the HTML report."""

import json
import re
import shlex
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp
from anndata import AnnData
from helpers.models.label_values import sets
from helpers.models.small_models import CELL_TYPES, vocabulary

from pipeline.config.io.loader import load_job
from pipeline.config.job import EvaluateConfig, stage_configs
from pipeline.core.manifest import Manifest
from pipeline.report import figures
from pipeline.report.bars import bar_svg, colors
from pipeline.report.evaluation import BASELINES, COPIES, NB, POISSON, SHUFFLED, Decoded, evaluate
from pipeline.report.gallery import gallery
from pipeline.report.html import MAX_BYTES, Picture, ReportInputs, number, write_report
from pipeline.report.outputs import WIDTH, summary_lines, write_tables
from pipeline.report.rows import MetricRow
from pipeline.report.verdict import verdict
from pipeline.stages.evaluate import changes_counts
from scldm.errors import InputError
from scldm.metrics.distribution.true_process import TruthScores
from scldm.metrics.from_anndata import EvaluationError
from scldm.metrics.genes.expression import chunks, log1p_cp10k
from scldm.metrics.score import Score
from scldm.metrics.streaming import stream

CONFIG = EvaluateConfig(n_pcs=4, n_top_genes=30, n_neighbors=5, min_class_cells=15, resamples=10, refits=5, umap=False)
ROOT = Path(__file__).resolve().parents[3]
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
    means = held_out.X[:30].toarray() + 0.1
    draws = sp.csr_matrix(np.random.default_rng(0).poisson(means))
    decoded = Decoded(np.arange(30), means, np.full(30, 70.0), draws)
    made = toy(150, 2)
    streamed = stream(chunks(sp.csr_matrix(made.X)), np.full(150, 1 / 150))
    return evaluate(
        held_out=held_out, training=toy(240, 1), generated=made, labels=["kind"], config=CONFIG, decoded=decoded,
        extra={EVIL: worse(150, 5)}, streamed=streamed,
    )  # fmt: skip


def worse(n: int, seed: int) -> AnnData:
    """Cells of no type: every label has the genes of all."""
    cells = toy(n, seed)
    cells.obs["kind"] = cells.obs["kind"].to_numpy()[np.random.default_rng(0).permutation(n)]
    return cells


def test_cells_of_the_real_law_are_scored_as_good_as_real(result):
    assert result.parts.generated.n_cells == 60
    assert result.generated["gene_mean_r2"].value > 0.95
    assert result.generated["label_accuracy.kind"].value > 0.95
    assert result.chance["kind"] == pytest.approx(1 / 3)
    assert result.generated["reconstruction_nll"].value == pytest.approx(70)
    assert (
        result.generated["reconstruction_gene_pearson"].value
        > result.baselines[POISSON]["reconstruction_gene_pearson"].value
    )
    assert list(result.baselines) == [*BASELINES, EVIL]
    assert not result.notes


def test_all_candidates_have_the_rows_that_are_of_cells_and_intervals_in_them(result):
    rows = {row.name: row for row in result.rows}
    of_cells = [r for r in result.rows if r.score.group not in ("reconstruction", "streamed")]
    assert all(set(r.baselines) == {*BASELINES, EVIL} for r in of_cells)
    assert all(s.half_width is not None for r in of_cells if r.score.group != "label" for s in r.all.values())
    assert rows["streamed_gene_mean_r2"].floor.value > 0.9
    assert set(rows["reconstruction_mse_draws"].baselines) == {POISSON, NB}
    assert rows["memorisation_share"].baselines[COPIES].value == 1
    assert rows["memorisation_share"].score.value < 0.2
    assert rows["library_size_ks"].baselines[SHUFFLED].value > rows["library_size_ks"].score.value


def test_an_extra_candidate_is_scored_and_judged_as_any_other(result):
    row = next(r for r in result.rows if r.name == "conditional_w2.kind")
    assert row.against(EVIL) == "nearer"
    assert re.search(rf"{re.escape(EVIL)} \(\d+ of \d+ metrics\)", result.verdict)
    assert "No sign of copies" in result.verdict
    alone = evaluate(held_out=toy(60, 0), training=toy(240, 1), generated=worse(150, 5), labels=["kind"], config=CONFIG)
    # The same cells, matched by another stream of random numbers.
    assert alone.generated["conditional_w2.kind"].value == pytest.approx(row.baselines[EVIL].value, rel=0.15)


def test_measured_cells_whose_counts_were_changed_are_not_called_copies(result):
    moved = replace(result, changed=True)
    assert "copies of training cells" not in moved.verdict
    assert "does not say whether they are copies" in moved.verdict


@pytest.mark.parametrize(
    ("settings", "changes"),
    [({"method": "pooled"}, True), ({"method": "shift"}, True), ({"method": "flow", "counts": "changed"}, True),
     ({"method": "flow", "counts": "drawn"}, False), ({"like": "train"}, False)],
    ids=str,
)  # fmt: skip
def test_what_changes_the_counts_of_measured_cells_is_read_from_the_settings_of_the_stage(settings, changes):
    assert changes_counts(SimpleNamespace(config=settings)) is changes


def test_extra_candidates_need_names_and_labels_of_their_own():
    given = {"held_out": toy(60, 0), "training": toy(240, 1), "generated": toy(150, 2), "labels": ["kind"]}
    with pytest.raises(ValueError, match="per-label NB is taken"):
        evaluate(**given, config=CONFIG, extra={NB: toy(90, 3)})
    unlabelled = toy(90, 3)
    unlabelled.obs["kind"] = np.nan
    with pytest.raises(ValueError, match="for every cell: scVI lacks kind"):
        evaluate(**given, config=CONFIG, extra={"scVI": unlabelled})
    with pytest.raises(ValueError, match=r"scVI cells must have the 36 genes .* got 30"):
        evaluate(**given, config=CONFIG, extra={"scVI": toy(90, 3)[:, :30]})
    control = CONFIG.model_copy(update={"control": {"drug": "none"}})
    with pytest.raises(ValueError, match=r"evaluate\.control names drug, which is no label .* there are kind"):
        evaluate(**given, config=control)


def test_too_few_cells_of_the_held_out_classes_are_named():
    few = toy(90, 3, classes=("a", "x"))
    with pytest.raises(EvaluationError, match=r"at least 16 cells .* there are 6 generated"):
        evaluate(held_out=toy(60, 0), training=toy(240, 1), generated=few[:12], labels=["kind"], config=CONFIG)


def test_tables_hold_every_candidate_with_its_interval(result, tmp_path, capsys):
    write_tables(tmp_path, result)
    table = pd.read_csv(tmp_path / "metrics.csv").set_index("metric")
    assert table.loc["w2", "generated_low"] <= table.loc["w2", "generated"] <= table.loc["w2", "generated_high"]
    assert set(table["against per-label NB"].dropna()) <= {"nearer", "farther", "not told apart"}
    written = json.loads((tmp_path / "metrics.json").read_text())
    assert written["baselines"] == [*BASELINES, EVIL]
    assert {r["metric"] for r in written["rows"]} == {r.name for r in result.rows}
    classes = pd.read_csv(tmp_path / "classes.csv")
    assert set(classes["candidate"]) == {"generated", "floor", *BASELINES, EVIL}
    assert set(classes["class"]) == {"a", "b", EVIL}


def test_the_summary_of_a_terminal_is_short_narrow_and_in_words(result):
    lines = summary_lines(result)
    assert max(map(len, lines)) <= WIDTH < 80
    header = next(line for line in lines if "real vs real" in line)
    assert header.split("real vs real")[1].strip() in ("per-label NB", "per-label Poisson", "shuffled genes")
    of = {line[:33].strip(): line[33:].split() for line in lines if line[33:].strip()}
    w2 = next(row for row in result.rows if row.name == "w2")
    assert of["distance (Wasserstein-2)"][0] == number(w2.score.value)
    assert of["distance (Wasserstein-2)"][1] == number(w2.floor.value)
    [label] = [of[title] for title in of if title.endswith("found again (kNN)")][:1]
    assert all(value.endswith("%") for value in label)
    assert of["copies of training cells"] in (["none", "found"], ["possible"])
    said = " ".join(lines).split("copies of training cells")[1]
    assert said.count(". ") <= 1, "one sentence; the report has the others"


def test_protocols_own_their_settings():
    assert EvaluateConfig(protocol="cfgen").gene_rule == "seurat_v3"
    assert EvaluateConfig(protocol="cfgen", n_pcs=30).class_average == "classes"
    again = EvaluateConfig.model_validate(EvaluateConfig(protocol="paper").model_dump())
    assert again.space_from == "held_out"
    with pytest.raises(
        ValueError, match=r"protocol \(cfgen\) owns these settings: n_pcs is 30 in it, got 50; gene_rule"
    ):
        EvaluateConfig(protocol="cfgen", n_pcs=50, gene_rule="variance")
    with pytest.raises(ValueError, match=r"refits \(30\) must not exceed resamples \(20\)"):
        EvaluateConfig(refits=30, resamples=20)


def test_a_protocol_changes_the_space_and_names_what_is_not_known():
    few = {"n_neighbors": 5, "resamples": 5, "refits": 5, "min_class_cells": 15, "umap": False}
    given = {"held_out": toy(60, 0), "training": toy(240, 1), "generated": toy(150, 2), "labels": ["kind"]}
    found = evaluate(**given, config=EvaluateConfig(protocol="paper", **few))
    assert "not published" in found.facts["protocol"]
    assert found.facts["PCA"].startswith("30 components fitted on held-out cells")
    assert "conditional_w1.kind" in found.generated
    assert found.floor["memorisation_share"].value < 0.15  # looked for in a space of training cells all the same


def test_same_seed_same_numbers(result):
    again = evaluate(held_out=toy(60, 0), training=toy(240, 1), generated=toy(150, 2), labels=["kind"], config=CONFIG)
    assert all(result.generated[k].value == s.value for k, s in again.generated.items())


def test_missing_classes_and_missing_labels_are_noted():
    lacking = evaluate(
        held_out=toy(60, 0),
        training=toy(240, 1),
        generated=toy(90, 2, classes=("a", "b")),
        labels=["kind"],
        config=CONFIG,
    )
    assert lacking.notes == [
        f"Too few generated cells to match the held-out composition, missing: {EVIL} (20).",
        f"Too few cells for scores within classes of kind (real, generated): {EVIL} (20, 0).",
    ]
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


@pytest.mark.row("S7")
def test_report_is_one_small_file_that_escapes_labels_and_needs_no_network(result, tmp_path):
    pictures = list(gallery(result, CONFIG, CURVES))
    assert [p.name for p in pictures] == ["embedding", "genes", "cells", "labels_kind", "conditional_kind", "training"]
    assert all(p.png.startswith(b"\x89PNG") for p in pictures)
    stage = {"stage": "ingest", "version": "abc", "seconds": "1.0", "finished": "now", "detail": {"config": EVIL}}
    inputs = ReportInputs(
        title="t", verdict=f"{result.verdict} {EVIL}", notes=[EVIL], facts=result.facts, rows=result.rows,
        baseline_names=list(result.baselines), yardstick=NB, pictures=pictures,
        provenance=[stage], reproduce=f"run {EVIL}",
    )  # fmt: skip
    write_report(tmp_path / "report.html", inputs)
    text = (tmp_path / "report.html").read_text()
    assert "<script" not in text
    assert "&lt;script&gt;" in text
    assert "http" not in text
    assert text.count("<svg") > 40
    assert "not told apart" in text
    assert len(text) < MAX_BYTES


def test_a_report_above_its_limit_is_refused(tmp_path):
    big = Picture("big", "big", "", b"\x00" * MAX_BYTES)
    empty = ReportInputs("t", "v", [], {}, [], [], "", [big], [], "")
    with pytest.raises(ValueError, match=r"big 5,000,000"):
        write_report(tmp_path / "r.html", empty)


def test_a_bar_goes_from_the_floor_to_the_score_and_far_ones_do_not_flatten_the_rest():
    score = lambda v: Score(v, "lower", 0.0, "distance", "d", np.array([v - 0.1, v + 0.1, v]))  # noqa: E731
    scores = {"generated": score(2.0), "floor": score(1.0), "a": score(3.0), "b": score(2.5), "c": score(1000.0)}
    svg = bar_svg(scores, colors(list(scores)))
    widths = [float(w) for w in re.findall(r'width="([\d.]+)" height="5"', svg)]
    generated, a, b, c = widths
    assert a == pytest.approx(2 * generated, abs=0.3)
    assert b == pytest.approx(1.5 * generated, abs=0.3)
    assert c < 4 * generated
    assert "Z" in svg  # the triangle of what is beyond
    assert bar_svg({"generated": score(1.0)}, colors([])) == ""


def test_the_command_that_makes_a_report_again_holds_its_settings_and_inputs():
    from pipeline.stages.evaluate import _reproduce

    config = EvaluateConfig(control={"cytokine": "no cytokine"}, protocol="cfgen", seed=3)
    inputs = {"generate": Manifest("generate", "v", "/my runs/demo/generate/v", {}, {}, {}, 1.0, 1.0)}
    program, run, job_file, *settings = shlex.split(_reproduce(config, inputs))
    assert (program, run) == ("scldm", "run")
    job = load_job(ROOT / job_file, settings)
    assert stage_configs(job)["evaluate"] == config
    assert job.inputs == {"generate": "/my runs/demo/generate/v"}


def test_rows_without_floor_or_resamples_get_no_verdict():
    score = Score(1.0, "lower", 0.0, "distance", "d")
    assert MetricRow("d", score).against("b") is None
    assert MetricRow("d", score, score, {"b": score}).against("b") is None
    assert MetricRow("d", score, score).at_floor is None


def row_of(name: str, generated: float, floor: float, baselines: dict[str, float]) -> MetricRow:
    """A metric whose halves differ by a hundredth."""
    score = lambda v: Score(v, "lower", 0.0, "distance", name, v + np.linspace(-0.01, 0.01, 10))  # noqa: E731
    return MetricRow(name, score(generated), score(floor), {k: score(v) for k, v in baselines.items()})


def test_the_verdict_says_which_baselines_are_beaten_and_by_how_many_metrics():
    rows = [
        row_of("w2", 2.0, 1.0, {NB: 3.0, POISSON: 4.0, SHUFFLED: 2.0}),
        row_of("energy", 2.0, 1.0, {NB: 3.0, POISSON: 4.0, SHUFFLED: 5.0}),
        row_of("frechet", 2.0, 1.0, {NB: 1.5, POISSON: 4.0, SHUFFLED: 5.0}),
    ]
    said = verdict(rows, [NB, POISSON, SHUFFLED], {})
    assert said == (
        "By most of the metrics that tell them apart (95 % intervals), generated cells are nearer to real cells than "
        "all 3 baselines: per-label NB (2 of 3 metrics), per-label Poisson (3 of 3 metrics) and shuffled genes "
        "(2 of 2 metrics). 0 of 3 metrics do not tell generated cells from real ones."
    )


def test_the_verdict_does_not_hide_a_baseline_that_is_not_beaten():
    rows = [row_of("w2", 3.0, 1.0, {NB: 2.0, POISSON: 4.0, SHUFFLED: 3.0})]
    said = verdict(rows, [NB, POISSON, SHUFFLED], {})
    assert said.startswith(
        "By most of the metrics that tell them apart (95 % intervals), generated cells are nearer to real cells than "
        "per-label Poisson (1 of 1 metrics), but not than per-label NB (0 of 1 metrics) and shuffled genes (no metric "
        "tells the two apart)."
    )
    none = verdict([row_of("w2", 3.0, 1.0, {NB: 2.0})], [NB], {})
    assert "generated cells are not nearer to real cells than per-label NB (0 of 1 metrics)." in none


def test_the_verdict_says_how_near_cells_are_to_the_process_that_they_were_drawn_from():
    frechet = {"generated": 3.14, "held-out": 1.5, NB: 9.9}
    truth = TruthScores({"the process": 1158.6, "under a per-label NB": 1402.0, "the VAE": 1167.8}, frechet, 4000)
    said = verdict([row_of("w2", 3.0, 1.0, {NB: 2.0})], [NB], {}, truth)
    assert (
        "The Fréchet distance to 4,000 fresh cells of the process that the cells were drawn from is 3.1 for generated "
        "cells, 1.5 for held-out real ones and 9.9 for per-label NB. Held-out counts have a negative log-likelihood of "
        "1,168 nats a cell under the VAE, 1,159 under that process and 1,402 under a per-label NB."
    ) in said


def test_a_class_keeps_its_colour_whatever_the_order():
    assert figures.class_colors(["b", "a"]) == figures.class_colors(["a", "b"])
    assert figures.class_colors([f"{i:02}" for i in range(30)])["25"] == figures.UNLABELLED


@pytest.mark.integration  # numba compiles for some 15 s
def test_umap_puts_both_kinds_into_one_map():
    real, generated = np.random.default_rng(0).normal(size=(2, 60, 5))
    a, b = figures.umap_coordinates(real, generated, seed=0)
    assert a.shape == b.shape == (60, 2)
    assert np.isfinite(a).all()


# ---- cells of a Gaussian head --------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def on_log_scale():
    """Cells of the real law with the noise of a Gaussian head."""
    held_out, made = toy(60, 0), toy(150, 2)
    values = log1p_cp10k(made.X).toarray()
    made.X = (values + np.random.default_rng(0).standard_normal(values.shape)).astype(np.float32)
    made.uns["scldm"] = {"scale": "log1p_cp10k"}
    decoded = Decoded(np.arange(30), log1p_cp10k(held_out.X[:30]).toarray().astype(np.float32) + 0.5)
    streamed = stream([sp.csr_matrix(made.X)], np.full(150, 1 / 150), counted=False)
    return evaluate(
        held_out=held_out, training=toy(240, 1), generated=made, labels=["kind"], config=CONFIG, decoded=decoded,
        streamed=streamed,
    )  # fmt: skip


def test_all_candidates_are_compared_on_the_scale_of_the_generated_cells(on_log_scale, result):
    rows = {row.name: row for row in on_log_scale.rows}
    of_cells = [r for r in on_log_scale.rows if r.score.group not in ("reconstruction", "streamed")]
    assert all(set(r.baselines) == set(BASELINES) for r in of_cells)
    # Real cells are the same as in a comparison of counts, and so is their score; baselines are other draws.
    for name in ("w2", "gene_mean_r2", "conditional_mmd2.kind", "gene_correlation_pearson"):
        assert rows[name].floor.value == pytest.approx(result.floor[name].value, rel=1e-6)
        assert rows[name].baselines[NB].value == pytest.approx(result.baselines[NB][name].value, rel=0.3)
    assert rows["gene_variance_r2"].score.value < rows["gene_variance_r2"].baselines[NB].value  # the noise is seen
    assert rows["reconstruction_mse"].score.value == pytest.approx(0.25, abs=1e-5)
    assert rows["reconstruction_mse"].baselines[NB].value > 0
    assert rows["streamed_gene_mean_r2"].floor.value > 0.9


def test_scores_that_only_counts_have_are_left_out_by_name_with_the_reason(on_log_scale, result, tmp_path):
    missing = set(result.generated) - set(on_log_scale.generated)
    assert missing == set(on_log_scale.left_out)
    assert {"library_size_ks", "reconstruction_nll", "reconstruction_zero_accuracy"} <= missing
    scale, left_out = on_log_scale.notes[:2]
    assert "log1p CP10k" in scale
    assert all(name in left_out for name in missing)
    assert "hardly ever exactly zero" in left_out
    assert "log1p CP10k" in on_log_scale.facts["scale"]
    assert result.left_out == {}
    assert "scale" not in result.facts
    write_tables(tmp_path, on_log_scale)
    assert json.loads((tmp_path / "metrics.json").read_text())["left_out"] == on_log_scale.left_out


def test_pictures_of_values_have_no_library_sizes(on_log_scale):
    names = [picture.name for picture in gallery(on_log_scale, CONFIG, {})]
    assert "genes" in names
    assert "cells" not in names


def test_a_control_is_found_by_its_value_and_a_class_that_is_none_is_refused():
    from pipeline.stages.evaluate import with_known_control

    names = vocabulary(CELL_TYPES, sets(classes=("A", "A+B", "ctrl"), zero=["ctrl"]))
    assert with_known_control(EvaluateConfig(control={"drugs": "B+A"}), names).control == {"drugs": "A+B"}
    assert with_known_control(CONFIG, names) == CONFIG
    with pytest.raises(InputError, match=r"evaluate\.control\.cell_type: .*'b'.*\n.*evaluate\.control\.drugs: .*ctrol"):
        with_known_control(EvaluateConfig(control={"drugs": "ctrol", "cell_type": "b"}), names)
    other = EvaluateConfig(control={"donor": "d1"})  # a label that the model lacks: `evaluate` says so
    assert with_known_control(other, names) == other
