"""Statistics of all generated cells in one pass, in the memory of a batch."""

import tracemalloc

import anndata
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp
from helpers.models.metric_cells import cells

from pipeline.core.manifest import Manifest, write_manifest
from pipeline.report.streamed import stream_generated
from pipeline.stages.evaluate import open_generated, read_generated
from scldm.errors import InputError
from scldm.metrics.cell_set import CellSet
from scldm.metrics.from_anndata import EvaluationError
from scldm.metrics.genes import expression as ex
from scldm.metrics.streaming import composition_weights, stream, streamed_scores


def test_one_pass_with_even_weights_is_the_plain_statistics():
    generated = cells(70, 0).counts
    found = stream(ex.chunks(generated, 9), np.full(70, 1 / 70))
    direct = ex.gene_moments([generated])
    np.testing.assert_allclose(found.moments.mean, direct.mean)
    np.testing.assert_allclose(found.moments.m2 / 70, direct.m2 / 70, atol=1e-12)
    np.testing.assert_allclose(found.moments.n_zero, direct.n_zero, atol=1e-9)
    np.testing.assert_array_equal(found.library_size, ex.library_sizes(generated))


def test_weights_bring_another_composition_to_that_of_the_real_cells():
    real, generated = cells(400, 0), cells(400, 1)
    mostly_odd = generated[np.flatnonzero((generated.labels["type"] == "odd") | (np.arange(400) < 80))]
    weights, missing = composition_weights(mostly_odd.labels["type"], real.labels["type"])
    assert missing == []
    assert weights[mostly_odd.labels["type"] == "odd"].sum() == pytest.approx(0.5)
    own = (ex.gene_moments([real.counts]), ex.library_sizes(real.counts), ex.genes_per_cell(real.counts))
    weighted, plain = (
        streamed_scores(*own, stream([mostly_odd.counts], w))
        for w in (weights, np.full(mostly_odd.n_cells, 1 / mostly_odd.n_cells))
    )
    assert weighted["streamed_gene_mean_r2"].value > 0.97 > plain["streamed_gene_mean_r2"].value


def test_a_class_that_was_not_generated_is_named_and_one_that_is_not_wanted_has_weight_zero():
    weights, missing = composition_weights(np.array(["a", "a", "x"]), np.array(["a", "b"]))
    assert (weights.tolist(), missing) == ([0.5, 0.5, 0.0], ["b"])
    with pytest.raises(ValueError, match="no cell has a wanted class; the cells have x"):
        composition_weights(np.array(["x"]), np.array(["a"]))


def test_a_pass_over_another_number_of_cells_than_announced_is_an_error():
    with pytest.raises(ValueError, match="9 cells came for 10 weights"):
        stream([cells(9, 0).counts], np.full(10, 0.1))


GENES, PER_SHARD = 300, 4200  # more than a batch


def folder_of(root, n_shards):
    """A finished generate stage whose shards are links to one file: large to read, cheap to make."""
    (root / "cells").mkdir(parents=True)
    rng = np.random.default_rng(0)
    counts = sp.csr_matrix(rng.poisson(0.4, (PER_SHARD, GENES)).astype(np.int32))
    obs = pd.DataFrame({"kind": pd.Categorical(np.array(["a", "b"])[np.arange(PER_SHARD) % 2])})
    obs.index = [f"c{i}" for i in range(PER_SHARD)]
    anndata.AnnData(counts, obs, pd.DataFrame(index=[f"g{i}" for i in range(GENES)])).write_h5ad(
        root / "cells" / "part-00000.h5ad"
    )
    shards = []
    for k in range(n_shards):
        file = f"cells/part-{k:05d}.h5ad"
        if k:
            (root / file).hardlink_to(root / "cells" / "part-00000.h5ad")
        shards.append({"file": file, "n_cells": PER_SHARD, "sha256": "0" * 64})
    write_manifest(Manifest("generate", "v", str(root), {}, {}, {"shards": shards}, seconds=0, finished_at=0))
    return Manifest("generate", "v", str(root), {}, {}, {"shards": shards}, seconds=0, finished_at=0)


def test_memory_does_not_grow_with_the_number_of_shards(tmp_path):
    real = CellSet(
        sp.csr_matrix(np.random.default_rng(1).poisson(0.4, (50, GENES))),
        {"kind": np.array(["a", "b"] * 25, dtype=object)},
    )
    peaks = {}
    for n_shards in (2, 6):
        manifest = folder_of(tmp_path / str(n_shards), n_shards)
        opened = open_generated(manifest, pd.Index([f"g{i}" for i in range(GENES)]))
        opened.obs  # noqa: B018  # 1 M cells' obs is held by design: a few numbers a cell
        tracemalloc.start()
        streamed, missing = stream_generated(opened, real, ["kind"])
        sample = read_generated(opened, max_cells=500, rng=np.random.default_rng(0))
        peaks[n_shards] = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert (streamed.n_cells, sample.n_obs, missing) == (n_shards * PER_SHARD, 500, [])
        expected = ex.log1p_cp10k(read_generated(opened, max_cells=10**9, rng=np.random.default_rng(0)).X).mean(0)
        np.testing.assert_allclose(streamed.moments.mean, np.asarray(expected).ravel(), rtol=1e-6)
    more_counts = 4 * PER_SHARD * GENES * 0.33 * 8  # bytes of the non-zeros of the further shards
    assert peaks[6] - peaks[2] < more_counts / 4


def test_cells_of_fewer_genes_are_refused_by_name(tmp_path):
    with pytest.raises(InputError, match="holds 300 genes and the vocabulary has 301: evaluate needs all"):
        open_generated(folder_of(tmp_path / "few", 1), pd.Index([f"g{i}" for i in range(301)]))


def test_generated_cells_of_other_classes_than_the_held_out_ones_are_refused(tmp_path):
    real = CellSet(sp.csr_matrix(np.ones((2, GENES))), {"kind": np.array(["x", "y"], dtype=object)})
    opened = open_generated(folder_of(tmp_path / "other", 1), pd.Index([f"g{i}" for i in range(GENES)]))
    with pytest.raises(EvaluationError, match="no generated cell has a combination of kind that a held-out cell has"):
        stream_generated(opened, real, ["kind"])
