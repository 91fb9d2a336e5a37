"""What a job says of its source reaches the store, and no more than that."""

from types import SimpleNamespace

import anndata
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp

from pipeline.config.context import StageContext
from pipeline.config.io.loader import load_job
from pipeline.config.job import IngestConfig
from pipeline.data.sources.open import open_source
from pipeline.planning.sizes import data_facts
from pipeline.stages import ingest
from pipeline.workflow.schedule import resolve
from scldm.errors import InputError


def opened(tmp_path, **source):
    return open_source(IngestConfig.model_validate({"source": {"type": "soma", **source}}), tmp_path, [])


def test_a_public_bucket_is_read_without_an_account(tmp_path):
    store = opened(tmp_path, uri="s3://bucket/cells", region="eu-west-1", anonymous=True).store
    assert store.tiledb_config["vfs.s3.no_sign_request"] == "true"
    assert store.tiledb_config["vfs.s3.region"] == "eu-west-1"


def test_credentials_are_looked_for_by_default_and_never_written_down(tmp_path, monkeypatch):
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "AKIATHISISNOTAKEY")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "neither-is-this")
    config = dict(opened(tmp_path, uri="s3://bucket/cells").store.tiledb_config)
    assert config.get("vfs.s3.no_sign_request", "false") == "false"
    assert "AKIATHISISNOTAKEY" not in str(config)
    assert "neither-is-this" not in str(config)


@pytest.mark.parametrize("setting", [{"region": "eu-west-1"}, {"anonymous": True}])
def test_settings_of_s3_are_refused_for_a_folder(tmp_path, setting):
    with pytest.raises(InputError, match="are for s3:// addresses"):
        opened(tmp_path, uri=str(tmp_path / "cells"), **setting)


def test_a_key_in_a_job_file_is_not_accepted():
    with pytest.raises(ValueError, match="Extra inputs are not permitted"):
        IngestConfig.model_validate({"source": {"type": "soma", "uri": "s3://b/c", "aws_secret_access_key": "x"}})


def version(tmp_path, text):
    path = tmp_path / "job.yaml"
    path.write_text(f"kind: ingest\nname: a\noutput: {tmp_path / 'runs'}\n{text}")
    return resolve(load_job(path)).steps[0].version


def test_a_vocabulary_of_other_genes_is_another_version(tmp_path):
    genes = tmp_path / "genes.txt"
    job = f"source: {{type: synthetic}}\ngenes: {{vocabulary: {genes}}}\n"
    with pytest.raises(InputError, match=r"genes.vocabulary: .*no such file"):
        version(tmp_path, job)
    genes.write_text("ENSG00000000001")
    first = version(tmp_path, job)
    assert version(tmp_path, job) == first
    genes.write_text("ENSG00000000002")
    assert version(tmp_path, job) != first


def test_other_labels_of_10x_cells_are_another_version(tmp_path):
    table = tmp_path / "cells.csv"
    (sample := tmp_path / "sample").mkdir()
    (sample / "matrix.mtx").write_text("")
    job = f"source: {{type: 10x, path: {sample}, obs: {table}}}\n"
    with pytest.raises(InputError, match=r"source.obs: .*no such file"):
        version(tmp_path, job)
    table.write_text("barcode,cell_type\nA-1,B cell\n")
    first = version(tmp_path, job)
    table.write_text("barcode,cell_type\nA-1,T cell\n")
    assert version(tmp_path, job) != first


def test_the_size_of_a_job_counts_the_genes_of_its_vocabulary(tmp_path):
    genes = tmp_path / "genes.txt"
    genes.write_text("ENSG00000000001\nENSG00000000002")
    source = {"type": "synthetic", "n_cells": 500, "n_genes": 70}
    config = IngestConfig.model_validate({"source": source, "genes": {"vocabulary": str(genes)}})
    facts = data_facts(None, config)
    assert facts.n_genes == 2
    assert sum(facts.n_cells.values()) == 500


@pytest.mark.parametrize(
    ("files", "pattern", "names"),
    [
        (["d_train.h5ad", "d_test.h5ad"], "*.h5ad", {"d_train", "d_test"}),
        (["t_train/adata_0.h5ad", "t_test/adata_0.h5ad"], "*/*.h5ad", {"t_train", "t_test"}),
    ],
)
def test_a_file_of_test_cells_can_be_held_out(tmp_path, files, pattern, names):
    """As the paper's data sets come: one file to train on, one to test on."""
    for i, file in enumerate(files):
        path = tmp_path / "data" / file
        path.parent.mkdir(parents=True, exist_ok=True)
        x = np.random.default_rng(i).poisson(2, (40, 5)).astype(np.float32)
        obs = pd.DataFrame({"clusters": ["a", "b"] * 20}, index=[f"c{j}" for j in range(40)])
        anndata.AnnData(sp.csr_matrix(x), obs=obs).write_h5ad(path)
    test = next(name for name in names if "test" in name)
    config = IngestConfig.model_validate(
        {
            "source": {"type": "h5ad", "path": str(tmp_path / "data" / pattern)},
            "labels": ["clusters"],
            "split": {"validation": 0.1, "held_out": {"combinations": [{"dataset_id": test}]}},
        }
    )
    (tmp_path / "out").mkdir()
    facts = ingest.run(config, StageContext(tmp_path / "out", {}, 0, SimpleNamespace(), None))
    assert facts["n_cells"]["test"] == 40
    cells = pd.read_parquet(tmp_path / "out" / facts["cells"])
    first = 0 if "test" in sorted(files)[0] else 40
    assert cells.query("split == 'test'")["soma_joinid"].tolist() == list(range(first, first + 40))
