"""Measurements and layers of an experiment are listed, not guessed."""

import json
import os
import subprocess
import sys
from types import SimpleNamespace

import anndata
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp
import tiledbsoma.io

from pipeline.config.context import StageContext
from pipeline.config.job import IngestConfig
from pipeline.data.inspection.examine import Question, examine
from pipeline.stages import ingest
from scldm.errors import InputError

N = 200
COUNTS = np.random.default_rng(0).poisson(1.0, (N, 20)).astype(np.float32)


def experiment(folder, measurement="rna", layer="data", others=()):
    obs = pd.DataFrame({"cell_type": np.where(np.arange(N) % 2, "T", "B")}, index=[f"c{i}" for i in range(N)])
    adata = anndata.AnnData(sp.csr_matrix(COUNTS), obs, pd.DataFrame(index=[f"ENSG{i:011d}" for i in range(20)]))
    for other in others:
        adata.layers[other] = adata.X / 2
    tiledbsoma.io.from_anndata(str(folder / "e"), adata, measurement_name=measurement, X_layer_name=layer)
    return folder / "e"


def ingested(folder, **source):
    (folder / "o").mkdir()
    given = {"source": {"type": "soma", "uri": str(folder / "e"), **source}}
    return ingest.run(IngestConfig.model_validate(given), StageContext(folder / "o", {}, 0, SimpleNamespace(), None))


def test_the_only_measurement_and_layer_are_taken_and_said(tmp_path):
    uri = experiment(tmp_path)
    facts = ingested(tmp_path)
    assert (facts["measurement"], facts["layer"]) == ("rna", "data")
    assert f"ingest.source.measurement: rna, the only one of {uri}, is read." in facts["notes"]
    assert sum(facts["n_cells"].values()) == N
    [found] = examine(Question(str(uri), labels=("cell_type",)))
    assert not found.errors
    assert found.facts["counts"] == "measurement rna, layer data"


def test_of_several_layers_the_choices_are_in_the_message(tmp_path):
    uri = experiment(tmp_path, others=["halves"])
    with pytest.raises(InputError, match=r"no layer 'raw'.*data, halves.*ingest.source.layer"):
        ingested(tmp_path)
    [found] = examine(Question(str(uri)))
    assert "data, halves" in found.errors[0].message
    [found] = examine(Question(str(uri), layer="data"))
    assert not found.errors


def test_a_name_that_is_given_is_never_replaced(tmp_path):
    uri = experiment(tmp_path)
    with pytest.raises(InputError, match="no measurement 'RNA'"):
        ingested(tmp_path, measurement="RNA")
    [found] = examine(Question(str(uri), measurement="RNAs"))
    assert "no measurement 'RNAs'" in found.errors[0].message


def test_the_commands_take_the_measurement(tmp_path):
    uri = experiment(tmp_path, others=["halves"])
    run = lambda *words: subprocess.run(  # noqa: E731
        [sys.executable, "-m", "pipeline", *words], capture_output=True, text=True, env={**os.environ}, check=False
    )
    where = [str(uri), "--measurement", "rna", "--layer", "data"]
    looked = run("validate-data", *where, "--json", str(tmp_path / "found.json"))
    assert looked.returncode == 0, looked.stdout + looked.stderr
    assert json.loads((tmp_path / "found.json").read_text())["usable"]
    written = run("init", *where, "-o", str(tmp_path / "job.yaml"))
    assert written.returncode == 0, written.stdout + written.stderr
    assert "measurement: rna" in (tmp_path / "job.yaml").read_text()
