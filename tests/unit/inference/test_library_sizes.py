"""Library sizes of generated cells from other cells than the model's: where they may be from, and what is refused."""

from __future__ import annotations

import json

import anndata
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp
from helpers.models.small_models import CELL_TYPES, DONORS, GENES, vocabulary
from helpers.stages.generation_case import generate, write_inputs

from pipeline.config.input_paths import input_contents
from pipeline.config.job import GenerateConfig
from pipeline.core.manifest import Manifest, write_manifest
from pipeline.data.sources.library_sizes import library_size_problems, read_library_sizes
from pipeline.workflow.preflight import check_settings
from scldm.data.library_size import LibrarySizes
from scldm.errors import InputError

MODEL = vocabulary(CELL_TYPES, DONORS)
TYPES = ["T", "B"]


@pytest.fixture
def cells(tmp_path):
    """120 cells: T of 900 counts in the genes of the model, B of 300; and 50 counts in a gene that it lacks."""
    counts = np.zeros((120, len(GENES) + 1), np.float32)
    counts[:, -1] = 50
    counts[0::2, 0], counts[0::2, 1], counts[1::2, 2] = 800, 100, 300
    counts[:, 3] = np.arange(120) % 7
    obs = pd.DataFrame({"cell_type": pd.Categorical(TYPES * 60)}, index=[f"c{i}" for i in range(120)])
    made = anndata.AnnData(sp.csr_matrix(counts), obs=obs, var=pd.DataFrame(index=[*GENES, "other"]))
    made.write_h5ad(tmp_path / "cells.h5ad")
    return made


def test_sizes_of_a_file_are_over_the_genes_of_the_model_and_by_its_labels(tmp_path, cells):
    sizes = read_library_sizes(str(tmp_path / "cells.h5ad"), MODEL)
    own = np.log(np.asarray(cells.X[:, :-1].sum(1), np.float64).ravel())
    assert sizes.of({}).mean == pytest.approx(own.mean())
    assert sizes.of({"cell_type": "T"}).mean == pytest.approx(own[0::2].mean())
    assert sizes.of({"cell_type": "B"}).sd == pytest.approx(own[1::2].std())
    assert sizes.of({"cell_type": "B", "donor": "d1"}).level == "cell_type=B"  # the file has no donor
    assert sizes.of({"cell_type": "NK"}).level == "all"


def test_generated_cells_have_the_sizes_of_the_file_and_say_so(tmp_path, cells):
    inputs = write_inputs(tmp_path / "in")
    place = str(tmp_path / "cells.h5ad")
    table = [{"cell_type": "T", "n_cells": 40}, {"cell_type": "B", "n_cells": 40, "library_size": 77}]
    facts = generate(tmp_path / "out", inputs, cells=table, library_size={"of": place})
    made = anndata.read_h5ad(tmp_path / "out" / facts["shards"][0]["file"])
    assert facts["n_cells"] == 80
    sizes = made.obs["library_size"].to_numpy()
    assert sizes[:40].mean() == pytest.approx(903, rel=0.01)
    assert (sizes[40:] == 77).all()  # a row of a table stays as it is
    about = made.uns["scldm"]["library_size"]
    assert about.startswith(f"statistics of {place} (digest ")


def test_an_ingest_a_pipeline_and_a_model_are_places(tmp_path):
    inputs = write_inputs(tmp_path / "in")
    sizes = LibrarySizes.fit(np.array([100.0, 110.0] * 10), {"cell_type": np.array(TYPES * 10)})
    stage = tmp_path / "runs/mine/ingest/v1"
    stage.mkdir(parents=True)
    sizes.save(stage / "library_size.json")
    write_manifest(Manifest("ingest", "v1", str(stage), {}, {}, {}, 0.0, 1.0))
    for place in ("runs/mine", "runs/mine/ingest", "runs/mine/ingest/v1", "runs/mine/ingest/v1/library_size.json"):
        assert read_library_sizes(str(tmp_path / place), MODEL).to_json() == sizes.to_json()
    model = inputs["train_vae"].path("model")
    own = LibrarySizes.load(model / "library_size.json").to_json()
    assert read_library_sizes(str(model), MODEL).to_json() == own


def test_other_cells_make_another_version_and_another_place_does_not(tmp_path, cells):
    def digest(name):
        config = GenerateConfig(n_cells=1, library_size={"of": str(tmp_path / name)})
        return input_contents(config)["library_size"].digest

    first = digest("cells.h5ad")
    (tmp_path / "copy").mkdir()
    cells.write_h5ad(tmp_path / "copy/same.h5ad")
    cells.X *= 2
    cells.write_h5ad(tmp_path / "cells.h5ad")
    assert digest("cells.h5ad") != first
    assert digest("copy/same.h5ad") == first


def test_settings_without_a_place_are_as_they_were():
    assert GenerateConfig(n_cells=1).model_dump(mode="json")["library_size"] == "statistics"
    assert GenerateConfig(n_cells=1, library_size=500).model_dump(mode="json")["library_size"] == 500.0


# ---- bad input, before anything starts ---------------------------------------------------------------------------
def test_values_that_are_no_counts_are_refused(tmp_path, cells):
    cells.X = cells.X.log1p()
    cells.write_h5ad(tmp_path / "logs.h5ad")
    assert "holds values that are no counts; ingest these cells" in problem(tmp_path / "logs.h5ad")


def test_cells_without_a_gene_of_the_model_are_refused(tmp_path, cells):
    cells.var_names = [f"ENSG{i}" for i in range(len(GENES) + 1)]
    cells.write_h5ad(tmp_path / "other.h5ad")
    assert "none of the genes" in problem(tmp_path / "other.h5ad")


def test_a_model_without_statistics_is_refused(tmp_path):
    (tmp_path / "library_size.json").write_text(json.dumps({"missing": "upstream published none"}))
    assert "has no library-size statistics (upstream published none)" in problem(tmp_path)


def test_a_file_that_is_something_else_is_refused(tmp_path):
    (tmp_path / "a.json").write_text("[1, 2]")
    assert "holds no library-size statistics" in problem(tmp_path / "a.json")
    (tmp_path / "a.csv").write_text("x")
    assert "neither an .h5ad file of counts nor a library_size.json" in problem(tmp_path / "a.csv")


def problem(place) -> str:
    (found,) = library_size_problems(str(place), MODEL)
    return found


def test_a_job_is_refused_before_it_starts(tmp_path, cells):
    from pipeline.config.io.loader import load_job

    inputs = write_inputs(tmp_path / "in")
    cells.X = cells.X.log1p()
    cells.write_h5ad(tmp_path / "logs.h5ad")
    vae, flow = (inputs[x].path("model") for x in ("train_vae", "train_flow"))
    job = tmp_path / "job.yaml"
    job.write_text(
        f"kind: generate\nname: a\nmodel: {{vae: {vae}, flow: {flow}}}\nn_cells: 3\n"
        f"library_size: {{of: {tmp_path}/logs.h5ad}}\n"
    )
    with pytest.raises(InputError, match="holds values that are no counts"):
        check_settings(load_job(job))


def test_a_gaussian_head_has_no_library_sizes(tmp_path, cells):
    inputs = write_inputs(tmp_path / "in", head="gaussian")
    with pytest.raises(InputError, match=r"library_size of .*cells\.h5ad: the VAE has a gaussian head"):
        generate(tmp_path / "out", inputs, n_cells=4, library_size={"of": str(tmp_path / "cells.h5ad")})
