"""Advice of jobs that send cells through trained models, and of the notebook's functions."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import anndata
import tiledbsoma

import scldm
from helpers.files import faulty_tenx
from helpers.remedies.follow import Case, command, done, follows, message, named, other, setting, write_job
from helpers.stages.cell_stages import models, real_cells, run_stage, write_cells, write_soma
from helpers.stages.real_cell_jobs import ALL, USES_FLOW
from pipeline.config.io.loader import load_job
from pipeline.config.job import stage_configs
from pipeline.data.soma.write import write_frame
from scldm.checkpoints.upstream.sizes import NOT_GIVEN
from scldm.data.library_size import LibrarySizes

ROOT = Path(__file__).resolve().parents[3]


def folders(case: Case) -> dict[str, str]:
    return models(case.once("models", models))


def apply(case: Case, stage: str, source: dict[str, Any], *settings: str, **more: Any) -> Any:
    """Run a job on real cells in this process, with settings as on the command line. Returns the folder."""
    own = folders(case)
    model = own if stage in USES_FLOW else {"vae": own["vae"]}
    content = {"source": source, "model": model, "shard_size": 40, **ALL[stage], **more}
    job = load_job(write_job(case.folder / f"{stage}.yaml", kind=stage, **content), settings)
    made = case.folder / f"made-{len(list(case.folder.iterdir()))}"
    return run_stage(stage, made, stage_configs(job)[stage].model_dump(mode="json"))


def in_a_file(case: Case, cells: anndata.AnnData) -> dict[str, Any]:
    return {"type": "h5ad", "path": str(write_cells(case.folder / "cells.h5ad", cells))}


@follows(
    "pipeline/inference/rows.py: map one with source.columns: {{}: <column of the file>}",
    "pipeline/inference/rows.py: go without: unknown_labels: none",
    "pipeline/inference/rows.py: . Set unknown_labels: none to use them without that label",
)
def cells_lack_a_label_of_the_model(case: Case) -> None:
    cells = real_cells()
    cells.obs = cells.obs.rename(columns={"donor": "patient"})
    source = in_a_file(case, cells)
    said = message(apply, case, "log_likelihood", source)
    assert "labels" not in said.replace("unknown_labels", ""), said  # such a job has no setting of this name
    apply(case, "log_likelihood", source, setting(said, "source.columns").replace("<column of the file>", "patient"))
    tenx = {"type": "10x", "path": str(faulty_tenx.file(case.folder))}
    assert "labels" not in message(apply, case, "log_likelihood", tenx).replace("unknown_labels", "")
    cells.obs = cells.obs.rename(columns={"patient": "donor"}).astype({"donor": object})
    cells.obs.iloc[0, 1] = "d9"
    source = in_a_file(case, cells)
    said = message(apply, case, "log_likelihood", source)
    apply(case, "log_likelihood", source, setting(said, "unknown_labels"))


@follows("pipeline/inference/rows.py: obs has no column {}, a label of the model; {}")
def an_experiment_lacks_a_label_of_the_model(case: Case) -> None:
    """Columns of an experiment are read as they are called."""
    source = write_soma(case.folder / "soma")
    with tiledbsoma.open(source["uri"]) as experiment:
        table = experiment.obs.read().concat().to_pandas().drop(columns=["soma_joinid", "donor"])
    with tiledbsoma.open(source["uri"], "w") as experiment:
        del experiment["obs"]
    shutil.rmtree(Path(source["uri"]) / "obs")
    write_frame(Path(source["uri"]), "obs", table)
    said = message(apply, case, "log_likelihood", source)
    assert "source.columns" not in said
    apply(case, "log_likelihood", source, setting(said, "unknown_labels"))


@follows("pipeline/inference/applier.py: leave them out with empty_cells: drop, or check genes.match")
def cells_express_no_gene_of_the_model(case: Case) -> None:
    cells = real_cells()
    x = cells.X.tolil()
    x[3, 1:7] = 0
    cells.X = x.tocsr()
    source = in_a_file(case, cells)
    said = message(apply, case, "embed", source)
    apply(case, "embed", source, setting(said, "empty_cells"))
    after = other(said, message(apply, case, "embed", source, f"{named(said, 'genes.match')}=symbol"))
    assert "genes" in after


@follows(
    "pipeline/inference/applier.py: set max_genes={}, which draws that many of them by seed",
    "scldm/api/parts.py: jobs/embed.yaml draws so many of them with max_genes={}",
)
def cells_express_too_many_genes(case: Case) -> None:
    from helpers.models.small_models import CELL_TYPES, DONORS, write_vae

    vae = write_vae(case.folder / "vae", CELL_TYPES, DONORS, genes_seq_len=3)
    cells = real_cells()
    source = in_a_file(case, cells)
    said = message(apply, case, "embed", source, model={"vae": str(vae)})
    apply(case, "embed", source, setting(said, "max_genes"), model={"vae": str(vae)})
    said = message(scldm.load(vae).encode, cells)
    job = named(said, "jobs/embed.yaml")
    own = f"source={{type: h5ad, path: '{source['path']}'}}"
    done("validate", ROOT / job, setting(said, "max_genes"), f"model.vae={vae}", own)


@follows(
    "scldm/data/align.py: or try match={} or genes=", "scldm/data/align.py: give a var column of unique ids with genes="
)
def genes_of_a_notebook_are_named_otherwise(case: Case) -> None:
    model, cells = scldm.load(folders(case)["vae"]), real_cells()
    cells.var = cells.var.assign(ids=list(cells.var_names))
    kept = "g0"  # with no gene in common, the column of ids would be taken
    cells.var_names = [name if name == kept else name.upper() for name in cells.var_names]
    said = message(model.encode, cells)
    match = setting(said, "match").partition("=")[2].strip("'")
    assert model.encode(cells, match=match).n_obs == 70
    assert named(said, "genes") == "genes"
    assert model.encode(cells, genes="ids").n_obs == 70
    cells.var_names = [kept] * cells.n_vars
    said = message(model.encode, cells)
    assert "genes=" in said
    assert model.encode(cells, genes="ids").n_obs == 70


@follows("scldm/api/conditions.py: leave it out, or load the others with scldm.load(folder, weights=…)")
def other_weights_are_asked_for(case: Case) -> None:
    folder = Path(folders(case)["vae"]).parent
    said = message(scldm.load(folder).generate, n=2, sampler={"weights": "raw", "steps": 2})
    assert "scldm.load(folder, weights=" in said
    assert scldm.load(folder, weights="raw").generate(n=2, sampler={"weights": "raw", "steps": 2}).n_obs == 2
    assert scldm.load(folder).generate(n=2, sampler={"steps": 2}).n_obs == 2


@follows(
    "scldm/api/methods/real_cells.py: has no flow next to it; use scldm.load(vae, flow=folder)",
    "scldm/api/methods/core.py: has no flow, and {}; scldm.load(vae, flow=folder)",
)
def a_vae_has_no_flow_next_to_it(case: Case) -> None:
    own = folders(case)
    alone = case.folder / "alone"
    shutil.copytree(own["vae"], alone)
    model = scldm.load(alone)
    assert "scldm.load(vae, flow=folder)" in message(model.generate, n=2)
    assert "scldm.load(vae, flow=folder)" in message(model.log_likelihood, real_cells(20), flow=True)
    both = scldm.load(alone, flow=own["flow"])
    assert both.generate(n=2, sampler={"steps": 2}).n_obs == 2
    assert len(both.log_likelihood(real_cells(20), flow=True)) == 20


@follows("scldm/api/folders.py: name the folders: scldm.load(vae_folder, flow=flow_folder)")
def a_flow_stage_has_lost_its_vae(case: Case) -> None:
    from pipeline.core.manifest import Manifest, write_manifest

    own = folders(case)
    stage = case.folder / "demo" / "train_flow" / "v1"
    shutil.copytree(own["flow"], stage / "model")
    facts = {"model": "model"}
    write_manifest(Manifest("train_flow", "v1", str(stage), {}, {"train_vae": "v0"}, facts, 1.0, 1.0))
    assert "scldm.load(vae_folder, flow=flow_folder)" in message(scldm.load, stage)
    assert scldm.load(own["vae"], flow=stage / "model").flow is not None


@follows("scldm/generation/recipe.py: give generate.library_size a number, or the table such a column")
def a_model_has_no_library_sizes(case: Case) -> None:
    flow = case.folder / "flow"
    own = folders(case)
    shutil.copytree(own["flow"], flow)
    LibrarySizes({}, NOT_GIVEN).save(flow / "library_size.json")
    model = scldm.load(own["vae"], flow=flow)
    said = message(model.generate, {"cell_type": "T"}, n=2, sampler={"steps": 2})
    assert named(said, "generate.library_size")
    assert model.generate({"cell_type": "T"}, n=2, library_size=50, sampler={"steps": 2}).n_obs == 2
    table = [{"cell_type": "T", "n_cells": 2, "library_size": 50}]
    assert model.generate(table, sampler={"steps": 2}).n_obs == 2
    job = write_job(case.folder / "job.yaml", kind="generate", like="train")
    done("validate", job, "library_size=50")


@follows("scldm/api/parts.py: ask for {} cells or fewer, or write any number of them to files with a batch job")
def a_notebook_holds_no_such_number_of_cells(case: Case) -> None:
    model = scldm.load(Path(folders(case)["vae"]).parent)
    said = message(model.generate, n=10**12)
    _, job = command(said, "scldm run")
    done("validate", ROOT / job, "like=null", "n_cells=1000000000")


@follows("scldm/metrics/distribution/projection.py: give it more cells, or take gene_rule=variance")
def genes_cannot_be_ranked(case: Case) -> None:
    job = write_job(case.folder / "job.yaml", kind="evaluate", gene_rule="seurat_v3")
    done("validate", job, "gene_rule=variance")
