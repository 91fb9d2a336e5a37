"""What the weights of a new VAE are computed from when a job trains it."""

from __future__ import annotations

import pandas as pd
import pytest
import torch
from helpers.training.small_job import ingest_small, spec_of

from pipeline.data.ingest.dataset import IngestedDataset
from pipeline.training.tasks.spec import VaeWorkerSpec
from pipeline.training.tasks.vae import new_vae
from scldm.nn.vae import VAE


@pytest.fixture(scope="module")
def ingested(tmp_path_factory):
    return ingest_small(tmp_path_factory.mktemp("ingest"))


def built(tmp_path, ingested, *, start_from: str | None = None, **settings) -> VAE:
    spec = VaeWorkerSpec.model_validate({**spec_of(tmp_path, ingested, **settings), "start_from": start_from})
    data, stats = IngestedDataset.open(ingested), pd.read_parquet(ingested.path("gene_stats"))
    mean = torch.tensor(stats["mean"].to_numpy(), dtype=torch.float32)
    return new_vae(spec, data.blocks("train"), n_genes=data.vocabulary.n_genes, mean_counts=mean)


def test_components_change_the_gene_embeddings_and_are_the_same_in_every_worker(tmp_path, ingested):
    random, one, two = (
        built(tmp_path, ingested, first_weights=x).state_dict() for x in ("random", "components", "components")
    )
    assert not torch.allclose(random["gene_embedding"], one["gene_embedding"])
    assert not torch.allclose(random["encoder.queries"], one["encoder.queries"])
    torch.testing.assert_close(random["gene_bias"], one["gene_bias"], rtol=0, atol=0)
    for name, values in one.items():
        torch.testing.assert_close(values, two[name], rtol=0, atol=0, msg=name)


def test_none_are_computed_where_a_model_gives_the_weights(tmp_path, ingested):
    random = built(tmp_path, ingested, first_weights="random").state_dict()
    started = built(tmp_path, ingested, first_weights="components", start_from="a model").state_dict()
    torch.testing.assert_close(random["gene_embedding"], started["gene_embedding"], rtol=0, atol=0)


def test_the_setting_is_in_no_dump_unless_it_is_set(tmp_path, ingested):
    settings = {x: spec_of(tmp_path, ingested, first_weights=x)["config"]["train"] for x in ("random", "components")}
    assert "first_weights" not in settings["random"]
    assert settings["components"]["first_weights"] == "components"
