"""Query mapping: labels with calibrated probabilities, and cells of unknown types that are flagged."""

from __future__ import annotations

import shutil
import warnings
from pathlib import Path

import anndata
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp
from helpers.models.small_models import GENES
from helpers.stages.cell_stages import models, real_cells
from scipy.special import softmax

import scldm
from scldm.api.analysis.mapping import (
    LabelTransfer,
    Novelty,
    Reference,
    calibration_error,
    deal,
    fit_temperature,
    trained_on,
    write_mapping,
)
from scldm.api.arguments import ArgumentError
from scldm.data.cell_counts import CellsError
from scldm.errors import CheckpointError

GOLDEN = Path(__file__).resolve().parents[3] / "golden" / "0.2.0" / "pipeline" / "runs" / "tiny"
TYPES = ("stem", "old", "young", "never seen")  # not in the order of the alphabet


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    root = tmp_path_factory.mktemp("models")
    models(root)
    return scldm.load(root)


def typed_cells(n: int, seed: int) -> anndata.AnnData:
    """Cells of three types that express other genes each."""
    rng = np.random.default_rng(seed)
    of = np.arange(n) % 3
    level = np.where(np.arange(6)[None] // 2 == of[:, None], 30.0, 1.0)
    obs = pd.DataFrame({"kind": pd.Categorical(np.array(TYPES)[of], categories=TYPES, ordered=True)})
    obs.index = [f"cell-{seed}-{i}" for i in range(n)]
    counts = sp.csr_matrix(rng.poisson(level).astype(np.float32))
    return anndata.AnnData(counts, obs=obs, var=pd.DataFrame(index=list(GENES)))


# ---- labels ---------------------------------------------------------------------------------------------------------
def test_labels_come_back_as_the_references_categories(model):
    reference, query = typed_cells(150, seed=0), typed_cells(60, seed=1)
    truth = query.obs.pop("kind")
    out = model.map(query, reference=reference, labels="kind")
    assert out is query
    assert out.obs["mapped_kind"].dtype == reference.obs["kind"].dtype, (
        "categories, their order, and that they have one"
    )
    assert (out.obs["mapped_kind"].astype(str) == truth.astype(str)).mean() > 0.5, "even under random weights"
    assert out.obs["mapped_kind_probability"].between(1 / 3, 1).all()
    np.testing.assert_array_equal(out.obsm["X_scldm"], model.encode(typed_cells(60, seed=1)).obsm["X_scldm"])
    assert out.uns["scldm_mapping"].loc["kind", ["n_cells", "n_classes"]].tolist() == [150, 3]


def test_a_cell_is_mapped_in_the_same_way_whatever_is_mapped_beside_it(model):
    reference = typed_cells(150, seed=0)
    whole = model.map(typed_cells(60, seed=1), reference=reference, labels=["kind"], seed=3)
    part = model.map(typed_cells(60, seed=1)[:7], reference=reference, labels=["kind"], seed=3)
    columns = ["mapped_kind_probability", "novelty"]
    np.testing.assert_allclose(part.obs[columns], whole.obs[columns].iloc[:7], rtol=1e-3)
    assert not model.map(typed_cells(3, seed=1)[:0], reference=reference, labels=["kind"]).n_obs


def test_cells_without_a_label_are_no_class_of_their_own(model):
    reference = typed_cells(150, seed=0)
    names = reference.obs["kind"].astype(object)
    names.iloc[:60] = [None, ""] * 30
    reference.obs["kind"] = names
    out = model.map(typed_cells(60, seed=1), reference=reference, labels="kind")
    assert out.obs["mapped_kind"].cat.categories.tolist() == sorted(TYPES[:3])
    assert out.uns["scldm_mapping"].loc["kind", "n_cells"] == 90


def test_a_mapped_query_is_written_and_mapped_again(model, tmp_path):
    out = model.map(typed_cells(30, seed=1), reference=typed_cells(150, seed=0), labels="kind")
    out.write_h5ad(tmp_path / "query.h5ad")
    again = model.map(tmp_path / "query.h5ad", reference=typed_cells(150, seed=0), labels="kind")
    pd.testing.assert_series_equal(again.obs["mapped_kind"], out.obs["mapped_kind"], check_names=False)


# ---- probabilities --------------------------------------------------------------------------------------------------
def test_the_temperature_is_the_factor_that_logits_are_too_large_by():
    rng = np.random.default_rng(0)
    logits = rng.normal(size=(20_000, 3))
    ids = (rng.random(20_000)[:, None] > softmax(logits, axis=1).cumsum(1)).sum(1)
    assert fit_temperature(4 * logits, ids)[0] == pytest.approx(4, rel=0.05)
    assert calibration_error(softmax(logits, axis=1), ids) < 0.02 < calibration_error(softmax(4 * logits, axis=1), ids)


def test_probabilities_of_overlapping_classes_are_how_often_they_are_right():
    rng = np.random.default_rng(0)
    ids = rng.integers(0, 3, 4_000)
    z = (np.eye(3)[ids] + rng.normal(size=(4_000, 3))).astype(np.float32)
    transfer = LabelTransfer.fit(z[:2_000], 10 * ids[:2_000], seed=0)
    found = transfer.probabilities(z[2_000:])
    assert transfer.codes.tolist() == [0, 10, 20]
    assert calibration_error(found, ids[2_000:]) < 0.05
    assert transfer.about["left_out_accuracy"] == pytest.approx((found.argmax(1) == ids[2_000:]).mean(), abs=0.04)


def test_labels_that_say_nothing_about_cells_are_mapped_by_chance():
    rng = np.random.default_rng(0)
    transfer = LabelTransfer.fit(rng.normal(size=(200, 12)), rng.integers(0, 2, 200), seed=0)
    assert transfer.probabilities(rng.normal(size=(200, 12))).max() < 0.7


def test_the_only_cell_of_a_class_is_always_trained_on():
    ids = np.array([0] * 7 + [1] * 2 + [2])
    folds = deal(ids, seed=0)
    assert folds[-1] == -1
    assert sorted(folds[:7]) == [0, 0, 1, 1, 2, 3, 4]
    assert len(set(folds[7:9])) == 2, "one of two is seen when the other is left out"


# ---- novelty --------------------------------------------------------------------------------------------------------
def test_as_many_cells_of_the_reference_are_called_novel_as_the_limit_says():
    z = np.random.default_rng(0).normal(size=(4_000, 8))
    assert (Novelty(z[:2_000]).score(z[2_000:]) > 0.95).mean() == pytest.approx(0.05, abs=0.02)


def spots(types: list[int], seed: int) -> np.ndarray:
    """Latents of cells, (n, 4): each type around a place of its own."""
    return 6 * np.eye(4)[types] + np.random.default_rng(seed).normal(size=(len(types), 4))


def test_cells_of_a_type_that_the_reference_lacks_are_novel():
    known, asked = [0, 1] * 150, [0, 1, 2] * 30
    reference = Reference(spots(known, seed=0), {"kind": pd.Categorical(known)})
    query = anndata.AnnData(np.zeros((90, 1), np.float32))
    with pytest.warns(UserWarning, match=r"3\d% of the query's cells are farther from the reference than 95%"):
        write_mapping(query, spots(asked, seed=1), reference, novel_above=0.95, seed=0)
    assert query.obs["is_novel"][np.equal(asked, 2)].all()
    assert query.obs["is_novel"][np.not_equal(asked, 2)].mean() < 0.15


def test_cells_of_known_types_are_mapped_without_a_warning():
    known = [0, 1] * 150
    reference = Reference(spots(known, seed=0), {"kind": pd.Categorical(known)})
    query = anndata.AnnData(np.zeros((300, 1), np.float32))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        write_mapping(query, spots(known, seed=1), reference, novel_above=0.95, seed=0)
    assert (query.obs["mapped_kind"].astype(int) == known).mean() > 0.99


# ---- the cells that a model was trained on --------------------------------------------------------------------------
def test_without_a_reference_it_is_the_encoded_cells_of_the_models_pipeline():
    model = scldm.load(GOLDEN)
    reference = trained_on(model.folders, ["cell_type"])
    assert reference.latents.shape == (139, 12)
    assert set(reference.labels["cell_type"]) <= set(model.labels["cell_type"])
    genes = model.vocabulary.feature_ids
    counts = np.random.default_rng(0).poisson(2.0, (20, len(genes))).astype(np.float32)
    out = model.map(anndata.AnnData(counts, var=pd.DataFrame(index=genes)), novel_above=1.0)
    assert tuple(out.obs["mapped_cell_type"].cat.categories) == model.labels["cell_type"]
    assert not out.obs["is_novel"].any()


def test_a_model_away_from_its_pipeline_needs_a_reference(model, tmp_path):
    with pytest.raises(CheckpointError, match=r"map\(query, reference=adata\)"):
        model.map(real_cells())
    assert model.map(real_cells(), reference=real_cells(seed=1)).obs["mapped_donor"].notna().all(), (
        "as the message says"
    )
    runs = Path(shutil.copytree(GOLDEN, tmp_path / "tiny"))
    next(runs.glob("encode/*/latents/train*.arrow")).write_bytes(b"no latents")
    with pytest.raises(CheckpointError, match=r"cannot be read .*reference=adata"):
        trained_on(scldm.load(runs).folders, ["cell_type"])


# ---- what is refused ------------------------------------------------------------------------------------------------
def test_all_wrong_arguments_are_said_at_once(model):
    query = typed_cells(30, seed=1)
    query.obs["novelty"] = 1.0
    with pytest.raises(ArgumentError) as error:
        model.map(query, reference=typed_cells(60, seed=0), labels=["kinds", "kind"], novel_above=2, seed=-1)
    for part in ("novel_above must be", "seed must be", "no 'kinds'; did you mean 'kind'?", "a column 'novelty'"):
        assert part in str(error.value)
    assert "X_scldm" not in query.obsm


@pytest.mark.parametrize(
    ("values", "problem"),
    [
        (["a"] * 60, "has 1 classes"),
        (["a", "b"] + [None] * 58, "is known of 2 cells"),
        ([f"cell {i}" for i in range(60)], "is another for each cell"),
    ],
)
def test_labels_that_cannot_be_learned_are_refused(model, values, problem):
    reference = typed_cells(60, seed=0)
    reference.obs["mine"] = values
    with pytest.raises(ArgumentError, match=problem):
        model.map(typed_cells(30, seed=1), reference=reference, labels="mine")


def test_wrong_kinds_of_arguments_are_refused(model):
    with pytest.raises(
        ArgumentError, match=r"(?s)query must be an AnnData.*reference must be an AnnData.*labels must be"
    ):
        model.map(3, reference=4, labels=5)
    with pytest.raises(ArgumentError, match="none of the model's labels"):
        model.map(typed_cells(30, seed=1), reference=typed_cells(60, seed=0))


def test_counts_of_both_sides_are_checked_before_anything_is_encoded(model):
    logged = [typed_cells(60, seed=s) for s in (0, 1)]
    for cells in logged:
        cells.X = np.log1p(cells.X.toarray())
    with pytest.raises(CellsError, match=r"(?s)query: .*no raw counts.*reference: .*no raw counts"):
        model.map(logged[0], reference=logged[1], labels="kind")
