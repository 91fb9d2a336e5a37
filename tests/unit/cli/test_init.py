"""`scldm init` looks at cells, writes a job that validates, says what it chose and why, and never replaces a file."""

from __future__ import annotations

import os
from pathlib import Path

import anndata as ad
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp
from helpers.files.h5ad_cases import SHARED, counts, real
from helpers.stages.cell_stages import write_soma
from typer.testing import CliRunner

from pipeline.cli.app import app
from pipeline.cli.init.defaults import choose
from pipeline.cli.init.inspect import SourceSummary, inspect_source
from pipeline.cli.init.job import Wanted, make_job
from pipeline.cli.init.labels import choose_labels, donor_column
from pipeline.cli.init.render import job_text
from pipeline.config.io.loader import load_job
from pipeline.data.inspection.columns import obs_profile
from pipeline.data.inspection.examine import Question
from pipeline.data.soma.write import write_experiment
from scldm.errors import InputError

pytestmark = pytest.mark.filterwarnings("ignore")
N = 240
cli = CliRunner()


def table(**columns):
    """obs with a cell type, and what else a test wants."""
    base = {"cell_type": pd.Categorical((["T", "B", "NK"] * N)[:N])}
    return pd.DataFrame({**base, **columns}, index=[f"c{i}" for i in range(N)])


def cells(obs=None, genes=None):
    obs = table() if obs is None else obs
    rng = np.random.default_rng(0)
    x = rng.poisson(1.0, (len(obs), 12)).astype(np.float32) + np.eye(len(obs), 12, dtype=np.float32)
    var = pd.DataFrame(index=genes or [f"ENSG{i:011d}" for i in range(12)])
    return ad.AnnData(sp.csr_matrix(x), obs=obs, var=var)


def labels_of(obs, *requested):
    return choose_labels(obs_profile(obs), len(obs), requested)


def init(*words):
    return cli.invoke(app, ["init", *map(str, words)])


# ---- labels --------------------------------------------------------------------------------------------------------
def test_cell_types_and_treatments_are_labels_and_each_other_column_has_a_reason():
    rng = np.random.default_rng(0)
    obs = table(
        cytokine=rng.choice(["IL2", "none"], N),
        batch=rng.choice(["b1", "b2"], N),
        n_umi=rng.integers(100, 10_000, N),
        score=rng.random(N),
        barcode=[f"AAAC{i}" for i in range(N)],
        assay="10x",
        empty=[None] * N,
        gaps=["x", "y"] * 60 + [None] * 120,
        lineage=pd.Categorical((["t", "b", "nk"] * N)[:N]),
        is_doublet=rng.random(N) < 0.3,
        soma_joinid=["a", "b"] * (N // 2),
    )
    found = labels_of(obs)
    assert found.columns == ("cell_type", "cytokine")
    reasons = {
        "batch": "batch, donor or sample; --label batch takes it",
        "n_umi": "whole numbers",
        "score": "a measurement, not classes",
        "barcode": "240 classes for 240 cells",
        "assay": "one value for all cells",
        "empty": "no value in any cell",
        "gaps": "120 of 240 cells have no value",
        "lineage": "groups the cells exactly as cell_type does",
        "is_doublet": "usable; --label is_doublet takes it",
        "soma_joinid": "SOMA uses this name",
    }
    for column, words in reasons.items():
        assert words in found.reason[column], (column, found.reason[column])
    assert len(found.verdicts) == len(obs.columns)


def test_names_are_read_loosely_and_without_any_the_first_usable_column_is_taken():
    types = (["T", "B", "NK"] * N)[:N]
    assert labels_of(pd.DataFrame({"x": ["p", "q"] * 120, "Seurat.Clusters": types})).columns == ("Seurat.Clusters",)
    terms = pd.DataFrame({"x": ["p", "q"] * 120, "cell_type_ontology_term_id": types})
    assert labels_of(terms).columns == ("cell_type_ontology_term_id",)
    assert labels_of(pd.DataFrame({"x": types, "y": ["p", "q"] * 120})).columns == ("x",)
    assert labels_of(pd.DataFrame({"score": np.random.default_rng(0).random(N)})).columns == ()


def test_what_is_asked_for_is_taken_or_refused_all_at_once():
    obs = table(batch=["b1", "b2"] * 120, score=np.linspace(0, 1, N), assay="10x")
    assert labels_of(obs, "batch").columns == ("batch",)
    with pytest.raises(InputError) as error:
        labels_of(obs, "cel_type", "score", "assay")
    assert "score" not in str(error.value).replace("columns: cell_type, batch, score", "")  # a number
    for words in ("cel_type: obs has no such column (did you mean 'cell_type'?", "1 class"):
        assert words in str(error.value)


def test_numbers_that_a_gap_made_floats_and_doses_are_classes_if_asked_for():
    obs = table(cluster=[0.0, 1.0, None, 2.0] * 60, dose=np.array([0.1, 1, 10] * 80, np.float32))
    assert labels_of(obs, "cluster", "dose").columns == ("cluster", "dose")
    assert "whole numbers (3 different)" in labels_of(obs).reason["cluster"]
    assert "doses or days" in labels_of(obs).reason["dose"]


@pytest.mark.parametrize(
    ("column", "values", "settings"),
    [
        ("score", np.linspace(0, 1, N), {"type": "number"}),
        ("dose_uM", [0.0, 0.1, 1, 10] * 60, {"type": "number", "unit": "uM", "scale": "log", "zero": [0]}),
        ("dose", [0.5, 1, 2] * 80, {"type": "number"}),
        ("time_h", [0, 6, 24] * 80, {"type": "number", "unit": "h"}),
        ("index", list(range(12)) * 20, {"type": "number"}),
        ("cluster", list(range(12)) * 20, None),
        ("cluster_id", [0.0, 1.0, None, 2.0] * 60, None),
        ("stage", ["1", "2", "3"] * 80, None),
    ],
)
def test_a_number_is_proposed_as_a_number_with_the_reason(column, values, settings):
    found = labels_of(table(**{column: values}), column)
    assert found.numbers == ({} if settings is None else {column: settings})
    assert ("taken as a number" in found.reason[column]) == (settings is not None)


def test_the_job_of_a_number_is_valid_and_says_so(tmp_path):
    cells(table(**{"dose uM": [0.0, 0.1, 1, 10] * 60})).write_h5ad(tmp_path / "cells.h5ad")
    made = init(tmp_path / "cells.h5ad", "--label", "cell_type", "--label", "dose uM", "-o", tmp_path / "job.yaml")
    assert made.exit_code == 0, made.output
    assert "taken as a number, on a log scale, 0 as the untreated control: it has fractions" in made.output
    job = load_job(tmp_path / "job.yaml")
    assert job.ingest.label_values["dose_uM"].model_dump() == {
        "type": "number", "unit": "uM", "scale": "log", "zero": ["0"]
    }  # fmt: skip


def test_donors_are_held_out_whole_where_there_are_many():
    many = obs_profile(table(patient=[f"p{i % 24}" for i in range(N)]))
    few = obs_profile(table(patient=[f"p{i % 3}" for i in range(N)]))
    assert donor_column(many) == "patient"
    chosen = choose(summary(many), choose_labels(many, N), gpus=0, cpus=2)
    assert chosen.split.value["by"] == "donor_id"
    assert chosen.columns == {"donor_id": "patient"}
    kept = choose(summary(few), choose_labels(few, N), gpus=0, cpus=2)
    assert kept.split.value["by"] == "cell"
    assert "3 donors (patient) are too few" in kept.split.reason


def test_a_quick_job_has_a_quarter_of_the_steps_and_says_so(tmp_path):
    found = summary(obs_profile(table()))
    labels = choose_labels(found.columns, N)
    whole, quick = (choose(found, labels, gpus=0, cpus=2, quick=q) for q in (False, True))
    for train, short in ((whole.vae_train, quick.vae_train), (whole.flow_train, quick.flow_train)):
        for key in ("max_steps", "validate_every", "checkpoint_every"):
            assert train.value[key] == 4 * short.value[key]
        assert "a quarter for a first look" in short.reason
    assert quick.n_generated.value <= -(-whole.n_generated.value // 4)


# ---- jobs ----------------------------------------------------------------------------------------------------------
def summary(columns, **other):
    plain = {
        "uri": "cells.h5ad",
        "kind": "h5ad",
        "n_files": 1,
        "n_cells": N,
        "n_genes": 12,
        "layer": None,
        "gene_id": None,
    }
    plain |= {"gene_name": None, "values_are": "raw counts", "n_stored": 900, "columns": columns}
    return SourceSummary(**plain | other)


@pytest.mark.parametrize("gpus", [0, 1, 8, 16])
@pytest.mark.parametrize(("n_cells", "n_genes"), [(N, 12), (2_638, 32_738), (150_000, 18_000), (30_000_000, 60_000)])
def test_every_size_makes_a_job_that_validates(tmp_path, gpus, n_cells, n_genes):
    columns = obs_profile(table())
    found = summary(columns, n_cells=n_cells, n_genes=n_genes)
    labels = choose_labels(columns, N)
    choices = choose(found, labels, gpus=gpus, cpus=2)
    text = job_text(found, labels, choices, name="mine", source={"type": "h5ad", "path": "cells.h5ad"}, cells={},
                    command="scldm init cells.h5ad", path="mine.yaml")  # fmt: skip
    (tmp_path / "mine.yaml").write_text(text)
    job = load_job(tmp_path / "mine.yaml")
    assert job.resources.gpus_per_worker == (1 if gpus else 0)
    assert job.train_vae.train.genes_per_step is None or job.train_vae.train.genes_per_step < n_genes
    assert max(map(len, text.splitlines())) <= 160


@pytest.mark.parametrize(
    ("n_cells", "gpus", "workers"),
    [(2_638, 8, 1), (13_113, 8, 1), (100_000, 8, 6), (100_000, 4, 4), (30_000_000, 8, 8), (30_000_000, 64, 64)],
)
def test_every_gpu_that_trains_has_128_cells_of_a_step_and_no_more_of_them_train_than_help(n_cells, gpus, workers):
    """100 passes in 10,000 steps of 128 cells a GPU: one GPU for every 12,800 training cells."""
    columns = obs_profile(table())
    found = summary(columns, n_cells=n_cells, n_genes=18_000)
    choices = choose(found, choose_labels(columns, N), gpus=gpus, cpus=2)
    assert choices.workers == workers
    for train in (choices.vae_train.value, choices.flow_train.value):
        assert train["feed"]["batch_size"] >= 128 * workers
        assert train["feed"]["micro_batch_size"] == 128
        assert train["max_steps"] >= 10_000
    alone = {1: "of which one GPU trains", 6: "of which 6 GPUs train"}.get(workers, "128 or more cells of a step on")
    assert alone in choices.machines
    assert ("would be passed through more often" in choices.machines) == (workers < gpus)


def test_all_gpus_encode_and_generate_where_one_trains_and_all_train_if_the_cells_are_not_known(tmp_path):
    columns = obs_profile(table())
    found, labels = summary(columns, n_cells=2_638), choose_labels(columns, N)
    choices = choose(found, labels, gpus=8, cpus=2)
    text = job_text(found, labels, choices, name="mine", source={"type": "h5ad", "path": "cells.h5ad"}, cells={},
                    command="scldm init cells.h5ad", path="mine.yaml")  # fmt: skip
    (tmp_path / "mine.yaml").write_text(text)
    job = load_job(tmp_path / "mine.yaml")
    assert (job.resources.workers.max, job.resources.actors) == (1, 8)
    assert job.encode.latents == "float16"
    census = summary({}, kind="Census", n_cells=0, n_genes=60_000)
    assert choose(census, choose_labels({}, 0), gpus=8, cpus=2).vae_train.value["feed"]["batch_size"] == 1024


def test_names_of_strangers_cannot_write_keys_into_the_job(tmp_path):
    obs = table()
    obs["x: {a}\noutput: /etc # "] = ["p", "q"] * 120
    obs["\x1b[31mred"] = np.linspace(0, 1, N)
    columns = obs_profile(obs)
    found, labels = summary(columns), choose_labels(columns, N, ["x: {a}\noutput: /etc # "])
    choices = choose(found, labels, gpus=0, cpus=2)
    text = job_text(found, labels, choices, name="mine", source={"type": "h5ad", "path": "cells.h5ad"}, cells={},
                    command="scldm init 'a\nb'", path="a\nb")  # fmt: skip
    (tmp_path / "mine.yaml").write_text(text)
    job = load_job(tmp_path / "mine.yaml")
    assert job.output == "runs"
    assert "\x1b" not in text
    [name] = job.ingest.labels
    assert job.ingest.source.columns == {name: "x: {a}\noutput: /etc # "}


# ---- looking -------------------------------------------------------------------------------------------------------
def seen(path, **question):
    return inspect_source(Question(str(path), **question))


def test_counts_are_found_in_a_layer_and_genes_in_a_column(tmp_path):
    adata = cells(genes=[f"gene{i}" for i in range(12)])
    adata.var["ensembl"] = [f"ENSG{i:011d}" for i in range(12)]
    adata.layers["umi"], adata.layers["rounded"] = adata.X.copy(), adata.X.copy()
    adata.X = adata.X.log1p()
    adata.write_h5ad(tmp_path / "a.h5ad")
    found = seen(tmp_path / "a.h5ad")
    assert (found["layer"], found["gene_id"], found["values_are"]) == ("umi", "ensembl", "raw counts")
    assert list(found["other_places"]) == ["layer: rounded"]
    assert not found["warnings"]  # the ids of the column are sound, whatever the index holds


def test_repeated_symbols_are_no_obstacle_where_a_column_has_ids(tmp_path):
    adata = cells(genes=["g"] * 12)
    adata.var["ensembl"] = [f"ENSG{i:011d}" for i in range(12)]
    adata.write_h5ad(tmp_path / "a.h5ad")
    assert seen(tmp_path / "a.h5ad")["gene_id"] == "ensembl"
    cells(genes=["g"] * 12).write_h5ad(tmp_path / "b.h5ad")
    [said] = seen(tmp_path / "b.h5ad")["errors"]
    assert "1 gene ids occur more than once" in said


def test_a_column_of_ids_with_gaps_is_neither_taken_nor_advised(tmp_path):
    adata = cells(genes=[f"gene{i}" for i in range(12)])
    adata.var["ensembl"] = [None, *(f"ENSG{i:011d}" for i in range(1, 12))]
    adata.write_h5ad(tmp_path / "a.h5ad")
    found = seen(tmp_path / "a.h5ad")
    assert found["gene_id"] is None
    [said] = found["warnings"]
    assert "var column ensembl holds them and cannot be used: 1 genes have no id in it" in said
    assert "ingest.source.gene_id" not in said


def test_features_that_are_no_genes_are_not_counted(tmp_path):
    adata = cells()
    adata.var["feature_types"] = ["Gene Expression"] * 9 + ["Antibody Capture"] * 3
    adata.write_h5ad(tmp_path / "a.h5ad")
    found = seen(tmp_path / "a.h5ad")
    assert found["n_genes"] == 9
    assert "3 of 12 features are no genes (3 Antibody Capture)" in found["warnings"][0]


def test_several_files_are_one_collection(tmp_path):
    for name in ("a", "b"):
        cells().write_h5ad(tmp_path / f"{name}.h5ad")
    found = seen(tmp_path)
    assert (found["n_files"], found["n_cells"], found["n_genes"]) == (2, 2 * N, 12)
    assert found["columns"]["cell_type"]["n_classes"] == 3


def test_files_of_one_class_each_have_that_many_classes(tmp_path):
    """Users save one file for each donor or treatment; each alone has nothing to tell apart."""
    for name in ("PBS", "IL-2", "IL-15"):
        cells(table(cytokine=name)).write_h5ad(tmp_path / f"{name}.h5ad")
    found = seen(tmp_path)
    column = found["columns"]["cytokine"]
    assert [column[x] for x in ("n_classes", "smallest", "middle", "largest")] == [3, N, N, N]
    assert "cytokine" in choose_labels(found["columns"], found["n_cells"]).columns
    assert choose_labels(found["columns"], found["n_cells"], ["dataset_id"]).columns == ("dataset_id",)


def test_genes_of_several_files_are_counted_once(tmp_path):
    for name, genes in (("a", range(12)), ("b", range(6, 18))):
        cells(genes=[f"ENSG{i:011d}" for i in genes]).write_h5ad(tmp_path / f"{name}.h5ad")
    assert seen(tmp_path)["n_genes"] == 18


def test_a_label_under_a_name_of_soma_is_refused_with_the_way_to_rename_it():
    with pytest.raises(InputError, match=r"--label nnz: .*ingest.source.columns: {my_nnz: nnz}"):
        choose_labels(obs_profile(table(nnz=["a", "b"] * (N // 2))), N, ["nnz"])


# ---- the command ---------------------------------------------------------------------------------------------------
def test_the_command_writes_a_commented_program_and_says_what_it_chose(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    cells(table(batch=["b1", "b2"] * 120)).write_h5ad("my cells.h5ad")
    result = init("my cells.h5ad", "-o", "jobs/mine.yaml")
    assert result.exit_code == 0, result.output
    for words in ("240 cells x 12 genes", "cell_type", "left out", "batch", "scldm plan jobs/mine.yaml"):
        assert words in result.stdout
    job, text = load_job("jobs/mine.yaml"), Path("jobs/mine.yaml").read_text()
    assert (job.name, job.ingest.labels) == ("my-cells", ["cell_type"])
    assert job.ingest.source.path == str(tmp_path / "my cells.h5ad")
    assert os.access("jobs/mine.yaml", os.X_OK)
    assert text.splitlines()[0].startswith("#!")
    assert text.count("#") > 12
    before = text
    again = init("my cells.h5ad", "-o", "jobs/mine.yaml", "--label", "batch")
    assert again.exit_code == 2
    assert "--force" in again.stderr
    assert Path("jobs/mine.yaml").read_text() == before
    assert init("my cells.h5ad", "-o", "jobs/mine.yaml", "--label", "batch", "--force").exit_code == 0
    assert load_job("jobs/mine.yaml").ingest.labels == ["batch"]
    assert not list(Path("jobs").glob(".*"))


@pytest.mark.parametrize(
    ("content", "words"),
    [(b"\x89HDF\r\n\x1a\n" + b"\0" * 600, "the file is"), (b"a,b", "not an HDF5 file"), (b"", "the file is empty")],
)
def test_damaged_files_are_errors_with_a_remedy(tmp_path, content, words):
    (tmp_path / "a.h5ad").write_bytes(content)
    [said] = seen(tmp_path / "a.h5ad")["errors"]
    assert words in said
    assert "copy or download" in said


def test_a_file_without_counts_exits_with_2_and_nothing_is_written(tmp_path):
    ad.AnnData(np.random.default_rng(0).random((N, 12)), obs=table()).write_h5ad(tmp_path / "a.h5ad")
    result = init(tmp_path / "a.h5ad", "-o", tmp_path / "mine.yaml")
    assert result.exit_code == 2
    assert "not whole numbers" in result.stderr
    assert "Traceback" not in result.output
    assert not (tmp_path / "mine.yaml").exists()


def test_wrong_options_are_named_together(tmp_path):
    (tmp_path / "mine.yaml").touch()
    result = init("census", "--tissue", "lung", "--layer", "raw", "-o", tmp_path / "mine.yaml")
    assert result.exit_code == 2
    assert "--layer" in result.stderr
    assert "exists" in result.stderr
    result = init(tmp_path / "absent.h5ad", "--tissue", "lung", "-o", tmp_path / "other.yaml")
    assert "--tissue is of the Census" in result.stderr


def test_the_census_needs_no_look(tmp_path):
    result = init(
        "census:2025-01-30", "--tissue", "lung", "--tissue", "blood", "-o", tmp_path / "lung.yaml", "--gpus", 8
    )
    assert result.exit_code == 0, result.output
    job = load_job(tmp_path / "lung.yaml")
    assert job.ingest.source.version == "2025-01-30"
    assert job.ingest.cells.tissue == ["lung", "blood"]
    assert job.ingest.labels == ["cell_type", "tissue_general"]
    assert job.ingest.cache is True


def test_a_cell_ranger_output_takes_its_labels_from_a_table(tmp_path):
    folder = tmp_path / "filtered_feature_bc_matrix"
    folder.mkdir()
    x = sp.coo_matrix(counts())
    (folder / "barcodes.tsv").write_text("".join(f"c{i}\n" for i in range(x.shape[0])))
    (folder / "genes.tsv").write_text("".join(f"ENSG{i:011d}\tG{i}\n" for i in range(x.shape[1])))
    lines = [f"{g + 1} {c + 1} {int(v)}" for c, g, v in zip(x.row, x.col, x.data, strict=True)]
    head = f"%%MatrixMarket matrix coordinate integer general\n{x.shape[1]} {x.shape[0]} {x.nnz}\n"
    (folder / "matrix.mtx").write_text(head + "\n".join(lines) + "\n")
    obs = tmp_path / "cells.csv"
    obs.write_text("barcode,cell_type\n" + "".join(f"c{i},{'ab'[i % 2]}\n" for i in range(x.shape[0])))
    found = seen(folder, obs=str(obs))
    assert found["kind"] == "10x"
    assert choose_labels(found["columns"], found["n_cells"]).columns == ("cell_type",)
    assert choose_labels(seen(folder)["columns"], found["n_cells"]).columns == ()


def test_an_experiment_is_read_where_it_is(tmp_path):
    write_soma(tmp_path / "cells.soma")
    found = seen(tmp_path / "cells.soma")
    assert (found["kind"], found["n_cells"], found["n_genes"]) == ("SOMA", 70, 8)
    given = {"region": None, "anonymous": False}
    text, words = make_job(SourceSummary(**found), Wanted("mine", tmp_path / "mine.yaml", "scldm init", given))
    (tmp_path / "mine.yaml").write_text(text)
    job = load_job(tmp_path / "mine.yaml")
    assert job.ingest.source.uri == str(tmp_path / "cells.soma")
    assert job.ingest.labels == ["cell_type"]
    assert "donor" in words


def test_columns_of_an_experiment_keep_their_names(tmp_path):
    obs = pd.DataFrame({"cell type": ["a", "b"] * 20, "n_cells": ["p"] * 20 + ["q"] * 20}, dtype="category")
    obs.insert(0, "obs_id", [f"c{i}" for i in range(40)])
    ids = [f"ENSG{i:011d}" for i in range(6)]
    var = pd.DataFrame({"feature_id": ids, "feature_name": ids, "feature_length": 0})
    write_experiment(tmp_path / "soma", obs, var, [sp.csr_matrix(counts())])
    result = init(tmp_path / "soma", "-o", tmp_path / "mine.yaml")
    assert result.exit_code == 0, result.output
    job = load_job(tmp_path / "mine.yaml")
    assert job.ingest.labels == ["cell type"]
    assert "ingest.source.columns" not in result.output


@real
@pytest.mark.parametrize(
    ("name", "labels", "gene_id"),
    [("pbmc3k_full", ("cell_type",), "ensembl_id"), ("worm_embryo_neurons", ("cell_type", "time_point"), None)],
)
def test_real_files(name, labels, gene_id):
    found = seen(SHARED / f"{name}.h5ad")
    assert choose_labels(found["columns"], found["n_cells"]).columns == labels
    assert found["gene_id"] == gene_id
    assert found["layer"] is None
