"""Advice of commands: `scldm init`, `scldm validate-data`, `scldm cells`, `scldm convert` and `scldm export`."""

from __future__ import annotations

import shlex
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import anndata as ad
import numpy as np
import pandas as pd
import scipy.sparse as sp
import tiledbsoma

import scldm
from helpers.files.faulty_experiments import experiment
from helpers.files.h5ad_cases import N, save
from helpers.models.exported_model import new_export
from helpers.remedies.follow import Case, command, done, follows, message, named, other, parse, refused, run
from helpers.stages.cells_commands import reconstructed
from pipeline.config.io.loader import load_job
from pipeline.core.manifest import Manifest
from pipeline.data.ingest import copies
from pipeline.data.soma.store import SomaStore
from pipeline.data.soma.write import write_experiment, write_frame


def cells_of(case: Case) -> Path:
    """Return a finished stage of cells; its path holds a space."""
    return case.once("finished cells", reconstructed) / "stage"


# ---- init ----------------------------------------------------------------------------------------------------------
def annotated(folder: Path, n: int = 60, **obs: Any) -> Path:
    x = np.random.default_rng(0).poisson(1.0, (n, 12)).astype(np.float32) + 1
    table = pd.DataFrame({"cell_type": (["T", "B", "NK"] * n)[:n], **obs}, index=[f"c{i}" for i in range(n)])
    var = pd.DataFrame(index=[f"ENSG{i:011d}" for i in range(12)])
    ad.AnnData(sp.csr_matrix(x), obs=table, var=var).write_h5ad(folder / "cells.h5ad")
    return folder / "cells.h5ad"


@follows(
    "pipeline/cli/init/command.py: --out {} is a folder; name a file in it: --out {}",
    "pipeline/cli/init/command.py: exists; another name with --out, or --force to replace it",
    "pipeline/cli/init/job.py: exists; another name with --out, or --force to replace it",
    "pipeline/cli/init/job.py: cannot be written ({}); --out elsewhere",
    "pipeline/cli/init/summary.py: scldm plan {}",
    "pipeline/cli/init/summary.py: scldm run {}",
    "pipeline/cli/init/render.py: scldm plan {}",
    "pipeline/cli/init/render.py: # Run: scldm run {}",
)
def init_writes_elsewhere(case: Case) -> None:
    case.read_here()
    cells, folder = annotated(case.folder), case.folder / "my jobs"
    folder.mkdir()
    said = refused("init", cells, "--out", folder)
    out = said.rpartition("--out ")[2].strip()
    said = done("init", cells, "--out", out)
    for name in ("plan", "run"):  # a run would train: the plan of the same job shows that the file is found
        words = command(said, f"scldm {name}")
        done("plan", *words[1:])
    text = Path(out).read_text()
    done("plan", *command(text, "scldm plan")[1:])
    done("plan", command(text.partition("        (settings")[0], "scldm run")[1])
    said = refused("init", cells, "--out", out)
    done("init", cells, "--out", out, named(said, "--force"))
    done("init", cells, named(said, "--out"), folder / "other.yaml")
    (case.folder / "file").touch()
    said = refused("init", cells, "--out", case.folder / "file" / "mine.yaml")
    done("init", cells, named(said, "--out"), folder / "third.yaml")


@follows("pipeline/cli/init/command.py: --tissue is of the Census (census:2025-01-30); of other sources set")
def init_takes_no_tissue_of_a_file(case: Case) -> None:
    case.read_here()
    cells = annotated(case.folder, tissue_general=["lung", "blood"] * 30)
    said = refused("init", cells, "--tissue", "lung", "-o", "mine.yaml")
    done("init", "census:2025-01-30", "--tissue", "lung", "-o", "census.yaml")
    done("init", cells, "-o", "mine.yaml")
    job: Any = load_job("mine.yaml", [f"{named(said, 'ingest.cells')}={{tissue: lung}}"])
    assert job.ingest.cells.tissue == "lung"


@follows(
    "pipeline/cli/init/labels.py: ; --label {} takes it all the same",
    "pipeline/cli/init/labels.py: usable; --label {} takes it",
    "pipeline/cli/init/labels.py: --label {}: obs has no such column",
    "pipeline/cli/init/labels.py: --label {}: {} class; a label needs two or more",
    "pipeline/cli/init/labels.py: ; ingest.source.columns renames it",
)
def init_takes_other_labels(case: Case) -> None:
    case.read_here()
    score = np.linspace(0, 1, 60)
    columns = {"batch": ["1", "2"] * 30, "my mood": ["x", "x", "y"] * 20, "n_cells": ["p"] * 20 + ["q"] * 40}
    cells = annotated(case.folder, score=score, assay="10x", **columns)
    said = done("init", cells, "-o", "mine.yaml") + Path("mine.yaml").read_text()
    assert "--label batch takes it all the same" in said
    assert "usable; --label 'my mood' takes it" in said
    for advice in ("--label batch", "--label 'my mood'"):
        done("init", cells, "-o", "mine.yaml", "--force", *shlex.split(advice))
    job: Any = load_job("mine.yaml")
    assert job.ingest.source.columns
    assert "n_cells" in said
    load_job("mine.yaml", [f"{named(said, 'ingest.source.columns')}={{count: n_cells}}", "ingest.labels=[count]"])
    said = refused("init", cells, "-o", "x.yaml", "--label", "my mod", "--label", "score", "--label", "assay")
    assert "did you mean 'my mood'" in said
    annotated(case.folder, score=pd.cut(score, 3, labels=["low", "mid", "high"]), assay=["a", "b"] * 30)
    done("init", cells, "-o", "x.yaml", "--label", "score", "--label", "assay")


@follows(
    "pipeline/cli/init/defaults.py: give more steps, or GPUs (--gpus)",
    "pipeline/cli/init/defaults.py: CPU cores; --gpus N writes a job for GPUs",
)
def init_writes_a_job_for_gpus(case: Case) -> None:
    from pipeline.cli.init.defaults import _passes

    case.read_here()
    cells = annotated(case.folder)
    done("init", cells, "-o", "mine.yaml")
    for said in (Path("mine.yaml").read_text(), _passes(10, 100)):
        done("init", cells, "-o", "mine.yaml", "--force", named(said, "--gpus"), "2")
        job: Any = load_job("mine.yaml")
        assert job.resources.gpus_per_worker == 1
    more = job.train_vae.train.max_steps * 2
    load_job("mine.yaml", [f"train_vae.train.max_steps={more}"])


# ---- validate-data -------------------------------------------------------------------------------------------------
@follows(
    "pipeline/data/inspection/examine.py: write the experiment again with the ids in a column feature_id",
    "pipeline/data/inspection/examine.py: --gene-id {}: ",
)
def an_experiment_has_no_ids_of_genes(case: Case) -> None:
    path = experiment(case.folder)
    with tiledbsoma.open(str(path / "ms/RNA/var")) as var:
        genes = var.read().concat().to_pandas().drop(columns="soma_joinid")
    case.read_here()

    def write(table: pd.DataFrame) -> None:
        with tiledbsoma.open(str(path / "ms/RNA"), "w") as collection:
            del collection["var"]
        SomaStore(str(path)).forget()
        shutil.rmtree(path / "ms/RNA/var")
        write_frame(path / "ms/RNA", "var", table)

    write(genes.rename(columns={"feature_id": "ensembl"}))
    said = refused("validate-data", path)
    assert "--gene-id ensembl: " in refused("validate-data", path, "--gene-id", "ensembl")
    write(genes.rename(columns={"feature_id": named(said, "var_id")}))
    done("validate-data", path)


@follows("pipeline/data/ingest/copies.py: `scldm validate-data` reads all counts and finds them.")
def copies_were_not_looked_for(case: Case) -> None:
    x = np.random.default_rng(0).poisson(3.0, (N, 30)).astype(np.float32)
    x[20:] = x[:20]
    obs = pd.DataFrame({"obs_id": [f"c{i}" for i in range(N)], "cell_type": pd.Categorical(["a", "b"] * 20)})
    ids = [f"ENSG{i:011d}" for i in range(30)]
    var = pd.DataFrame({"feature_id": ids, "feature_name": ids, "feature_length": 0})
    path = case.folder / "soma"
    write_experiment(path, obs, var, [sp.csr_matrix(x)], tile=16)
    case.patch.setattr(copies, "LARGE", 10)
    case.patch.setattr(copies, "COLUMNS", ("absent",))  # as experiments of others
    notes: list[str] = []
    copies.find_copies(SomaStore(str(path)), pd.DataFrame({"soma_joinid": range(N)}), notes)
    case.read_here()
    said = done(*command(notes[0], "scldm validate-data"), path)
    assert "20 of 40 cells have exactly the counts of an earlier cell" in said


@follows("pipeline/data/inspection/sandbox.py: ; allow more with --memory-gib")
def reading_took_too_much_memory(case: Case) -> None:
    from pipeline.data.inspection import sandbox

    child = "import sys; sys.stdin.read(); raise MemoryError"
    said = message(sandbox.ask, {"uri": "cells.h5ad"}, 1, child)
    path = save(case.folder / "a.h5ad")
    case.read_here()
    done("validate-data", path, named(said, "--memory-gib"), "2")


# ---- cells ---------------------------------------------------------------------------------------------------------
@follows("pipeline/workflow/runner.py: next              scldm cells head {}")
def a_job_says_what_comes_next(case: Case) -> None:
    from pipeline.workflow.runner import JobResult

    made = Manifest("embed", "v", str(cells_of(case)), {}, {}, {}, 1.0, 1.0)
    resolved: Any = SimpleNamespace(folder=case.folder, source=case.folder / "job.yaml")
    lines = JobResult(["embed"], {"embed": made}, resolved).lines()
    assert "70 x 6" in done(*command("\n".join(lines), "scldm cells head"))


@follows("pipeline/cli/cells.py: --shuffle works only with --to zarr")
def only_zarr_is_shuffled(case: Case) -> None:
    words = ["cells", "export", cells_of(case), case.folder / "out.zarr", "--shuffle", "0", "--to"]
    said = refused(*words, "h5ad")
    named(said, "--to")
    done(*words, said.partition("--to ")[2].partition(";")[0])


@follows(
    "pipeline/inference/export/h5ad.py: scldm cells export {} cells.zarr --to zarr",
    "scldm/cells/cells.py: scldm cells export {} cells.zarr --to zarr",
)
def cells_are_too_many_for_one_file(case: Case) -> None:
    from pipeline.inference.export import h5ad

    folder = cells_of(case)
    said = message(scldm.open_cells(folder).to_anndata, max_cells=10)
    done(*command(said, "scldm cells export"))
    case.patch.setattr(h5ad, "MAX_CELLS", 10)
    said = refused("cells", "concat", folder, "a.h5ad")
    parse(*command(said, "scldm cells export"))
    assert scldm.open_cells(folder).to_anndata(max_cells=100).n_obs == 70


@follows("pipeline/inference/export/soma.py: scldm cells export {} cells.h5ad --to h5ad")
def soma_takes_counts(case: Case) -> None:
    from pipeline.inference.export import soma

    folder = cells_of(case)
    with case.patch.context() as patch:
        patch.setattr(soma, "is_log_normalised", lambda _: True)
        said = refused("cells", "export", folder, "a.soma", "--to", "soma")
    done(*command(said, "scldm cells export"))


@follows(
    "scldm/cells/cells.py: `scldm cells verify {}` says what is wrong",
    "scldm/cells/shards.py: `scldm cells verify {}` lists all damaged files",
)
def shards_are_damaged(case: Case) -> None:
    folder = case.folder / "my cells"
    shutil.copytree(cells_of(case), folder)
    shard = sorted((folder / "cells").glob("*.h5ad"))[1]
    shard.write_bytes(shard.read_bytes()[:1000])
    said = message(scldm.open_cells(folder).to_anndata)
    code, verdict = run(*command(said, "scldm cells verify"))
    assert code == 1
    assert shard.name in verdict
    cells = scldm.open_cells(folder)
    said = message(cells._checked, pd.DataFrame(index=range(3)), folder)
    assert run(*command(said, "scldm cells verify"))[0] == 1


# ---- models --------------------------------------------------------------------------------------------------------
@follows(
    "scldm/checkpoints/output_folder.py: was not written by this command: choose another --out",
    "scldm/checkpoints/output_folder.py: was written by this command before: choose another --out, or give --force",
    "scldm/checkpoints/upstream/inputs.py: gene names, in the order of their ids: --genes FILE",
    "scldm/checkpoints/upstream/inputs.py: classes of {}: --metadata FILE",
    "scldm/checkpoints/upstream/inputs.py: --size-factors-mu and --size-factors-sd go together",
    "scldm/checkpoints/upstream/inputs.py: --size-factors-mu FILE --size-factors-sd FILE, or --no-size-factors",
    "scldm/checkpoints/upstream/settings.py: is missing: give it with --genes-seq-len",
    "scldm/checkpoints/native.py: or convert an upstream checkpoint with `scldm convert`",
)
def a_checkpoint_is_converted(case: Case) -> None:
    export = new_export(case.folder, case.patch)
    kept = case.folder / "kept"
    kept.mkdir()
    for path in export.folder.iterdir():
        if path not in (export.checkpoint, export.config):
            path.rename(kept / path.name)
    said = export.refused()
    export.set("datamodule.datamodule.genes_seq_len", None)
    assert "--genes-seq-len" in export.refused()
    options: list[Any] = [named(export.refused(), "--genes-seq-len"), 6]
    mu, sd = sorted(kept.glob("*.pkl"))
    [names] = kept.glob("*.json")
    options += [named(said, "--genes"), names, named(said, "--metadata"), names]
    after = other(said, export.refused(options=(*options, named(said, "--size-factors-mu"), mu)))
    made = export.run(*options, "--size-factors-mu", mu, named(after, "--size-factors-sd"), sd)
    assert made.exit_code == 0, made.output
    again = export.run(*options, named(said, "--no-size-factors"))
    assert again.exit_code == 2
    assert export.run(*options, "--no-size-factors", named(again.output, "--force")).exit_code == 0
    export.out = case.folder / "work" / "upstream"
    there = export.run(*options, "--no-size-factors")
    assert there.exit_code == 2
    export.out = case.folder / "work" / named(there.output, "--out")
    assert export.run(*options, "--no-size-factors").exit_code == 0
