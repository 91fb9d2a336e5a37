"""Cells that hold log1p CP10k values are compared on that scale, with what exists there and nothing else."""

import numpy as np
import pytest
import scipy.sparse as sp
from anndata import AnnData
from helpers.models.metric_cells import N_GENES, cells, settings

from scldm.metrics.cell_set import CellSet
from scldm.metrics.compare import ONLY_OF_COUNTS, Comparison
from scldm.metrics.distribution.projection import RealSpace
from scldm.metrics.from_anndata import cell_set
from scldm.metrics.genes import expression as ex
from scldm.metrics.streaming import stream, streamed_scores


def logged(made: CellSet) -> CellSet:
    return CellSet(ex.as_log_values(ex.log1p_cp10k(made.counts)), made.labels, counted=False)


def comparison(*, counted: bool, **changes) -> Comparison:
    real, reference = cells(120, 0), cells(240, 1)
    space = RealSpace.fit(reference.counts, n_top_genes=30, n_pcs=5, seed=0)
    return Comparison(real, reference, space, settings(**changes), labels=("type",), counted=counted)


def test_transformed_counts_have_the_scores_of_the_counts():
    made = cells(120, 2, scale=1.5)
    on_counts = comparison(counted=True).scores(made).scores
    on_values = comparison(counted=False).scores(logged(made)).scores
    assert set(on_counts) - set(on_values) == set(ONLY_OF_COUNTS)
    assert set(on_values) <= set(on_counts)
    for name, score in on_values.items():
        assert score.value == pytest.approx(on_counts[name].value, rel=1e-3, abs=1e-5), name


def test_a_candidate_of_counts_is_compared_on_the_same_scale_as_one_of_values():
    made, chosen = cells(120, 2, scale=1.5), comparison(counted=False)
    of_counts, of_values = (chosen.all_scores({"a": x})["a"].scores for x in (made, logged(made)))
    assert of_counts.keys() == of_values.keys()
    assert not set(of_counts) & set(ONLY_OF_COUNTS)
    for name, score in of_values.items():
        assert score.value == pytest.approx(of_counts[name].value, rel=1e-3, abs=1e-5), name


def test_noise_around_the_values_is_seen():
    made = logged(cells(120, 2))
    noise = np.random.default_rng(0).standard_normal(made.values.shape)
    noisy = CellSet(sp.csr_matrix(made.values.toarray() + noise), made.labels, counted=False)
    clean, drawn = (comparison(counted=False).scores(x).scores for x in (made, noisy))
    assert drawn["w2"].value > clean["w2"].value
    assert drawn["gene_variance_r2"].value < clean["gene_variance_r2"].value - 0.5


def test_a_fold_change_of_values_is_the_difference_of_their_means():
    real, made = cells(120, 0), logged(cells(120, 2, scale=3.0))
    noisy = made.values.toarray() - 0.3  # means below zero, as a Gaussian head has for silent genes
    made = CellSet(sp.csr_matrix(noisy), made.labels, counted=False)
    chosen = comparison(counted=False)
    found = chosen.scores(made).classes["type"].classes["odd"].values
    change = []
    for side in (real, made):
        x, odd = side.log_values.toarray()[:, chosen.space.genes], side.labels["type"] == "odd"
        change.append((x[odd].mean(0) - x[~odd].mean(0)) / np.log(2))
    assert found["lfc_pearson"][0] == pytest.approx(np.corrcoef(*change)[0, 1], abs=1e-6)
    assert found["lfc_slope"][0] == pytest.approx(np.polyfit(*change, 1)[0], abs=1e-6)


def test_values_are_never_taken_for_counts():
    made = logged(cells(20, 0))
    with pytest.raises(ValueError, match="and no counts"):
        made.counts  # noqa: B018
    with pytest.raises(ValueError, match="and no counts"):
        comparison(counted=True).scores(made)
    assert not made[np.arange(3)].counted


def test_an_anndata_says_what_it_holds():
    values = np.array([[-0.5, 2.0], [0.1, 0.0]], np.float32)
    said = AnnData(values, uns={"scldm": {"scale": "log1p_cp10k"}})
    np.testing.assert_array_equal(cell_set(said, []).log_values.toarray(), values)
    assert not cell_set(said, []).counted
    with pytest.raises(ValueError, match="must not be negative"):
        cell_set(AnnData(values), [])
    with pytest.raises(ValueError, match="must be finite; 1 entries"):
        cell_set(AnnData(np.array([[np.inf, 1.0]], np.float32), uns=said.uns), [])


def test_streamed_values_have_gene_statistics_only():
    real, made = cells(100, 0), cells(70, 1)
    own = (ex.gene_moments([real.counts]), ex.library_sizes(real.counts), ex.genes_per_cell(real.counts))
    weights = np.full(70, 1 / 70)
    of_counts = streamed_scores(*own, stream(ex.chunks(made.counts, 9), weights))
    of_values = streamed_scores(*own, stream(ex.chunks(logged(made).values, 9), weights, counted=False))
    assert set(of_values) == {"streamed_gene_mean_r2", "streamed_gene_variance_r2"}
    for name, score in of_values.items():
        assert score.value == pytest.approx(of_counts[name].value, abs=1e-5)


def test_genes_that_no_real_cell_has_do_not_raise_the_agreement():
    """A Gaussian head gives every gene a value, so that all would count as seen."""
    real, made = cells(100, 0), logged(cells(100, 1))
    silent = sp.csr_matrix((100, 3 * N_GENES))
    padded = sp.hstack([real.counts, silent]).tocsr(), sp.hstack([made.values, silent + 0.001 * sp.eye(100, 120)])
    a, b = ex.moments_of([ex.log1p_cp10k(padded[0])]), ex.moments_of([padded[1].tocsr()])
    with_silent = ex.gene_statistics_agreement(a, b, counted=False)
    own = ex.moments_of(real.log_chunks()), ex.moments_of(made.log_chunks())
    assert with_silent == pytest.approx(ex.gene_statistics_agreement(*own, counted=False))
