"""An evaluation of synthetic cells whose process is known: what it knows of them, and what it says."""

import json
from types import SimpleNamespace

import numpy as np
import pytest

from pipeline.config.context import StageContext
from pipeline.config.job import EvaluateConfig, IngestConfig
from pipeline.core.manifest import Manifest
from pipeline.data.ingest.dataset import IngestedDataset
from pipeline.report.evaluation import NB, Decoded, evaluate
from pipeline.report.outputs import write_tables
from pipeline.stages import ingest
from pipeline.stages.evaluate import true_process
from scldm.metrics.distribution.true_process import nb_nll

SOURCE = {"type": "synthetic", "n_cells": 700, "n_genes": 60, "n_types": 3, "within_types": "trajectories"}
CONFIG = EvaluateConfig(n_pcs=4, n_neighbors=5, min_class_cells=15, resamples=10, refits=5, umap=False)


def ingested(folder, source, **config):
    folder.mkdir()
    settings = IngestConfig.model_validate({"source": source, "labels": ["cell_type"], **config})
    facts = ingest.run(settings, StageContext(folder, {}, 0, SimpleNamespace(), None))
    manifest = Manifest("ingest", "v", str(folder), settings.model_dump(mode="json"), {}, facts, 0.0, 0.0)
    return manifest, IngestedDataset.open(manifest)


@pytest.fixture(scope="module")
def cells(tmp_path_factory):
    manifest, data = ingested(tmp_path_factory.mktemp("known") / "ingest", SOURCE)
    return manifest, data.anndata("test"), data.anndata("train")


def test_what_is_known_is_of_the_cells_that_were_held_out(cells):
    manifest, held_out, _ = cells
    known = true_process(manifest, held_out)
    counts = held_out.X.toarray()
    own = nb_nll(held_out.X, known.expected, known.theta).mean()
    others = nb_nll(held_out.X, np.roll(known.expected, 1, axis=0), known.theta).mean()
    assert own < others - 10
    z = (counts - known.expected) / np.sqrt(known.expected + known.expected**2 / known.theta)
    assert z.std() == pytest.approx(1, abs=0.3)  # of few cells, with heavy tails
    assert len(known.expected) == held_out.n_obs
    assert known.fresh.shape[1] == held_out.n_vars
    assert known.fresh.shape[0] % held_out.n_obs == 0


def test_the_verdict_and_the_files_have_the_figures(cells, tmp_path):
    manifest, held_out, training = cells
    known = true_process(manifest, held_out)
    rows = np.arange(20)
    decoded = Decoded(rows, known.expected[rows], nb_nll(held_out.X[rows], known.expected[rows], known.theta))
    decoded = Decoded(rows, decoded.mu, decoded.nll, held_out.X[rows])
    result = evaluate(
        held_out=held_out, training=training[:500], generated=training[-150:], labels=["cell_type"], config=CONFIG,
        decoded=decoded, process=known,
    )  # fmt: skip
    assert "fresh cells of the process" in result.verdict
    assert result.truth.nll["the VAE"] == pytest.approx(result.truth.nll["the process"])  # it decodes the truth
    assert result.truth.nll["under a per-label NB"] > result.truth.nll["the process"]
    assert result.truth.frechet["generated"] < result.truth.frechet[NB]
    write_tables(tmp_path, result)
    assert json.loads((tmp_path / "metrics.json").read_text())["process"] == result.truth.as_plain()


def test_of_other_cells_nothing_is_known(cells, tmp_path):
    _, held_out, _ = cells
    plain = Manifest("ingest", "v", "", {"source": {**SOURCE, "within_types": None}}, {}, {}, 0.0, 0.0)
    assert true_process(plain, held_out) is None
    files = Manifest("ingest", "v", "", {"source": {"type": "h5ad", "path": "x.h5ad"}}, {}, {}, 0.0, 0.0)
    assert true_process(files, held_out) is None
