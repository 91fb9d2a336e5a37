"""Advice about the settings of a job, before anything runs, and about which job to run first."""

from __future__ import annotations

import shlex
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from helpers.remedies.follow import (
    Case,
    command,
    done,
    follows,
    message,
    named,
    other,
    pipeline_on,
    refused,
    run,
    setting,
    write_job,
)
from pipeline.config.io.loader import load_job
from pipeline.core.manifest import Manifest, write_manifest

ROOT = Path(__file__).resolve().parents[3]
SYNTHETIC = {"type": "synthetic", "n_cells": 60, "n_genes": 20}


def pipeline(case: Case, **sections: Any) -> Path:
    content = {"ingest": {"source": SYNTHETIC}, "generate": {"like": "train"}, **sections}
    return write_job(case.folder / "job.yaml", **content)


def training(case: Case, kind: str = "train_vae", **content: Any) -> Path:
    return write_job(case.folder / f"{kind}.yaml", kind=kind, **content)


# ---- names of settings ---------------------------------------------------------------------------------------------
@follows("pipeline/config/io/loader.py: an override is key.path=value, for example train.max_steps=20")
def an_override_without_a_value(case: Case) -> None:
    job = training(case)
    said = refused("validate", job, "train.max_steps")
    done("validate", job, setting(said.partition("for example")[2], "train.max_steps"))
    # In a pipeline the section has another name, which the next error gives.
    after = refused("validate", pipeline(case), "train.max_steps=20")
    named(after, "train_vae.train")


@follows("pipeline/config/io/errors.py: a job of kind {} has these settings at the top level{}")
def a_setting_of_a_pipeline_in_a_job_of_one_stage(case: Case) -> None:
    """Messages name settings as a pipeline has them."""
    job = write_job(case.folder / "ingest.yaml", kind="ingest", source=SYNTHETIC)
    said = refused("validate", job, "ingest.split.by=tile")
    assert "split.by instead of ingest.split.by" in said
    done("validate", job, "split.by=tile")


# ---- settings against each other -----------------------------------------------------------------------------------
@follows("pipeline/config/checks.py: ; set {}train.feed.lanes={}")
def lanes_are_no_multiple_of_the_workers(case: Case) -> None:
    for job, where in ((pipeline(case), "train_vae."), (training(case), "")):
        given = ["resources.workers=3", f"{where}train.feed.batch_size=60", "train_flow.train.feed.lanes=6",
                 "train_flow.train.feed.batch_size=60"][: 4 if where else 2]  # fmt: skip
        said = refused("validate", job, *given)
        done("validate", job, *given, setting(said.partition("; set ")[2], f"{where}train.feed.lanes"))


@follows("pipeline/config/checks.py: ; set {}train.feed.batch_size={}")
def a_batch_is_no_multiple_of_the_lanes(case: Case) -> None:
    job = pipeline(case)
    said = refused("validate", job, "train_flow.train.feed.batch_size=30")
    done("validate", job, setting(said.partition("; set ")[2], "train_flow.train.feed.batch_size"))


@follows("pipeline/config/checks.py: set resources.gpus_per_worker=1, and resources.workers to the number of GPUs")
def half_a_gpu_for_a_training_worker(case: Case) -> None:
    for gpus in ("0.5", "2"):
        said = refused("validate", pipeline(case), f"resources.gpus_per_worker={gpus}")
        workers = f"{named(said, 'resources.workers')}=4"
        done("validate", "job.yaml", setting(said.partition("; set ")[2], "resources.gpus_per_worker"), workers)


@follows(
    "pipeline/config/resources.py: is a range: set resources.workers={}",
    "pipeline/config/resources.py: set resources.actors=1",
    "pipeline/config/resources.py: set resources.gpus_per_worker=1",
    "pipeline/config/resources.py: ; or set resources.ray=true",
)
def several_workers_without_ray(case: Case) -> None:
    several = {"ray": False, "workers": {"min": 1, "max": 2}, "actors": {"min": 2, "max": 4}, "gpus_per_worker": 2}
    job = write_job(case.folder / "generate.yaml", kind="generate", n_cells=5, resources=several)
    said = refused("validate", job)
    one = [setting(said, f"resources.{name}") for name in ("workers", "actors", "gpus_per_worker")]
    done("validate", job, *one)
    done("validate", job, setting(said.partition("or set ")[2], "resources.ray"))


@follows("pipeline/workflow/preflight.py: set {}train.zero_stage=0, or a fixed number of workers")
def a_cautious_optimizer_on_some_workers(case: Case) -> None:
    job = pipeline(case, resources={"workers": {"min": 1, "max": 2}})
    given = ["train_vae.train.optimizer.cautious=true", "train_vae.train.zero_stage=1"]
    said = refused("validate", job, *given)
    done("validate", job, *given, setting(said.partition("; set ")[2], "train_vae.train.zero_stage"))
    done("validate", job, *given, f"{named(said, 'resources.workers')}=2")


@follows("pipeline/workflow/preflight.py: set it to 1, or leave {}precision out")
def a_precision_of_gpus_on_cpus(case: Case) -> None:
    job = pipeline(case)
    said = refused("validate", job, "encode.precision=tf32")
    assert "leave encode.precision out" in said
    done("validate", job, "encode.precision=tf32", f"{named(said, 'resources.gpus_per_worker')}=1")
    done("validate", job)


@follows("pipeline/workflow/preflight.py: set it to 1, or {}train.decoder=torch")
def kernels_for_a_gpu_on_cpus(case: Case) -> None:
    job = pipeline(case)
    said = refused("validate", job, "train_vae.train.decoder=triton")
    done("validate", job, setting(said.partition(", or ")[2], "train_vae.train.decoder"))
    done("validate", job, "train_vae.train.decoder=triton", f"{named(said, 'resources.gpus_per_worker')}=1")


@follows(
    "pipeline/training/tasks/vae.py: set resources.gpus_per_worker=1 on machines with GPUs, or train.decoder=torch"
)
def kernels_for_a_gpu_on_a_worker_without(case: Case) -> None:
    import torch

    from pipeline.training.tasks.vae import decoder_kernels

    case.patch.setattr(torch.cuda, "is_available", lambda: False)
    said = message(decoder_kernels, "triton")
    job = training(case)
    done("validate", job, "train.decoder=triton", setting(said, "resources.gpus_per_worker"))
    loaded: Any = load_job(job, [setting(said, "train.decoder")])
    assert decoder_kernels(loaded.train.decoder) == "torch"


@follows("pipeline/workflow/preflight.py: raise ingest.split.{} or give the source more cells")
def a_stage_needs_cells_of_a_split(case: Case) -> None:
    from pipeline.workflow.preflight import check_against_data

    job: Any = load_job(pipeline(case))
    empty = Manifest("ingest", "v", "", {}, {}, {"n_cells": {"train": 50, "validation": 0}, "n_genes": 20}, 1.0, 1.0)
    said = message(check_against_data, {"train_vae": job.train_vae}, empty)
    done("validate", "job.yaml", f"{named(said, 'ingest.split.validation')}=0.2")


@follows("pipeline/workflow/preflight.py: genes of the vocabulary; lower it")
def more_genes_are_seen_than_there_are(case: Case) -> None:
    from pipeline.workflow.preflight import check_against_data

    given = ["train_vae.train.genes_seen.mode=random_expressed", "train_vae.train.genes_seen.n=50"]
    job: Any = load_job(pipeline(case), given)
    found = Manifest("ingest", "v", "", {}, {}, {"n_cells": {"train": 50, "validation": 5}, "n_genes": 20}, 1.0, 1.0)
    said = message(check_against_data, {"train_vae": job.train_vae}, found)
    job = load_job("job.yaml", [*given, f"train_vae.{named(said, 'train.genes_seen.n')}=20"])
    check_against_data({"train_vae": job.train_vae}, found)


@follows("pipeline/config/stages.py: set vae.train to true, or remove {}")
def a_weight_of_a_vae_that_is_not_trained(case: Case) -> None:
    job = training(case, "train_flow", vae={"weight": 2.0})
    said = refused("validate", job)
    done("validate", job, f"{named(said, 'vae.train')}=true")


@follows("pipeline/config/stages.py: and vae.train trains it on; leave one of them out")
def samples_of_a_vae_that_is_trained_on(case: Case) -> None:
    job = training(case, "train_flow", vae={"train": True}, train={"sample_every": 10})
    said = refused("validate", job)
    done("validate", job, f"{named(said, 'vae.train')}=false")
    done("validate", job, f"{named(said, 'train.sample_every')}=null")


@follows("pipeline/config/stages.py: which have none; leave it out, or set vae.train=true")
def a_cap_on_genes_of_latents(case: Case) -> None:
    job = training(case, "train_flow", train={"feed": {"max_genes": 5}})
    said = refused("validate", job)
    done("validate", job, setting(said, "vae.train"))
    done("validate", job, f"{named(said, 'train.feed.max_genes')}=null")


@follows("pipeline/config/stages.py: owns these settings: {}; leave them out, or take protocol=default")
def a_protocol_owns_a_setting(case: Case) -> None:
    job = training(case, "evaluate", protocol="cfgen", n_pcs=7)
    done("validate", job, setting(refused("validate", job), "protocol"))


@follows(
    "pipeline/config/apply.py: and this job uses one: give model.flow",
    "pipeline/config/stages.py: and cells are generated by one: give model.flow",
)
def a_job_uses_a_flow(case: Case) -> None:
    from helpers.stages.cell_stages import models

    folders = models(case.once("models", models))
    job = training(case, "perturb", source=SYNTHETIC, to={"cell_type": "T"}, model={"vae": folders["vae"]})
    done("validate", job, f"{named(refused('validate', job), 'model.flow')}={folders['flow']}")
    job = training(case, "generate", n_cells=3, model={"vae": folders["vae"]})
    done("validate", job, f"{named(refused('validate', job), 'model.flow')}={folders['flow']}")


@follows("pipeline/config/stages.py: start_from gives weights to a flow that is trained on latents")
def a_flow_starts_from_weights_with_its_vae(case: Case) -> None:
    from helpers.stages.cell_stages import models

    folders = models(case.once("models", models))
    job = training(case, "train_flow", start_from=folders["flow"], vae={"train": True})
    done("validate", job, f"{named(refused('validate', job), 'start_from')}=null")
    done("validate", job, f"{named(refused('validate', job), 'vae.train')}=false")


@follows("pipeline/workflow/preflight.py: start_from.lora adds to weights that every worker holds")
def adapters_and_zero_3(case: Case) -> None:
    from helpers.stages.cell_stages import models

    folders = models(case.once("models", models))
    start = {"model": folders["vae"], "lora": {"rank": 2}}
    job = training(case, start_from=start, train={"zero_stage": 3})
    done("validate", job, setting(refused("validate", job), "train.zero_stage"))


@follows("pipeline/inference/replay.py: name real cells in ingest.replay.pipeline or ingest.replay.source")
def old_cells_of_a_model_without_counts(case: Case) -> None:
    from helpers.models.small_models import CELL_TYPES, write_flow, write_vae

    write_vae(case.folder / "old/vae", head="gaussian")
    write_flow(case.folder / "old/flow", CELL_TYPES)
    job = pipeline(case, ingest={"source": SYNTHETIC, "replay": {"model": str(case.folder / "old")}})
    said = refused("validate", job)
    named(said, "ingest.replay.pipeline")
    given = f"{named(said, 'ingest.replay.source')}={{type: synthetic, n_cells: 60, n_genes: 20, seed: 1}}"
    done("validate", job, "ingest.replay.model=null", given)


@follows(
    "pipeline/config/input_paths.py: is neither an .h5ad file of counts nor a library_size.json; name one of them",
    "pipeline/data/sources/library_sizes.py: name other cells, or set generate.library_size to a number",
)
def library_sizes_of_what_has_none(case: Case) -> None:
    from helpers.stages.cell_stages import models
    from pipeline.config.input_paths import input_contents
    from pipeline.config.job import GenerateConfig

    own = models(case.once("models", models))
    job = training(case, "generate", n_cells=3, model=own)
    (case.folder / "sizes.csv").write_text("1")
    config = GenerateConfig.model_validate({"n_cells": 3, "library_size": {"of": str(case.folder / "sizes.csv")}})
    named(message(input_contents, config), "library_size.json")
    path = case.folder / "library_size.json"
    path.write_text('{"missing": "none are published"}')
    given = f"library_size={{of: {path}}}"
    done("validate", job, f"{named(refused('validate', job, given), 'generate.library_size').partition('.')[2]}=500")
    path.write_text((Path(own["flow"]) / "library_size.json").read_text())
    done("validate", job, given)


@follows(
    "pipeline/config/io/named_models.py: {}: {}: false uses a trained model as it is",
    "pipeline/config/io/named_models.py: {} names a trained model; to use it as it is",
    "pipeline/config/io/named_models.py: {}: {} is that of {} and cannot be set",
)
def a_trained_model_is_named(case: Case) -> None:
    from helpers.stages.cell_stages import models

    folders = models(case.once("models", models))
    job = training(case, train=False)
    done("validate", job, f"{named(refused('validate', job), 'model')}={folders['vae']}")
    job = training(case, model=folders["vae"])
    said = refused("validate", job)
    done("validate", job, setting(said, "train"))
    done("validate", job, "model={}", setting(said, "start_from"))
    job = training(case, pretrained=folders["vae"], model={"d_model": 64})
    named(refused("validate", job), "model.d_model")
    done("validate", job, "model={}")


@follows("pipeline/config/apply.py: which this job does not ask for; leave it out")
def labels_that_are_not_judged(case: Case) -> None:
    job = training(case, "log_likelihood", source=SYNTHETIC, unknown_labels="none")
    said = refused("validate", job)
    done("validate", job, setting(said, "flow.labels"))
    done("validate", job, f"{named(said, 'unknown_labels')}=error")


@follows("pipeline/config/apply.py: and method: pooled changes them; set start=latents")
def pooled_cells_from_noise(case: Case) -> None:
    job = training(case, "perturb", source=SYNTHETIC, to={"cell_type": "B cell"}, method="pooled", start="noise")
    done("validate", job, setting(refused("validate", job), "start"))


@follows("pipeline/config/apply.py: {} cannot be set with method: shift, which uses no model; leave it out")
def a_shift_with_settings_of_models(case: Case) -> None:
    job = training(case, "perturb", source=SYNTHETIC, to={"cell_type": "B cell"}, method="shift", start="noise")
    said = refused("validate", job)
    done("validate", job, f"{named(said, 'start')}=latents")


@follows("pipeline/stages/reconstruct.py: set shard_size={} or less")
def dense_means_are_too_large(case: Case) -> None:
    from helpers.stages.cell_stages import models
    from pipeline.config.job import STAGE_CONFIGS
    from pipeline.stages import reconstruct

    folders = models(case.once("models", models))
    case.patch.setattr(reconstruct, "MAX_DENSE_BYTES", 4 * 6 * 1000)
    job = training(case, "reconstruct", source=SYNTHETIC, decode="mean", model={"vae": folders["vae"]})
    given: Any = {"source": SYNTHETIC, "decode": "mean", "model": {"vae": folders["vae"]}}
    config = STAGE_CONFIGS["reconstruct"].model_validate(given)
    said = message(reconstruct.run, config, SimpleNamespace(inputs={}, output=None))
    size = setting(said, "shard_size")
    assert size == "shard_size=1000"
    done("validate", job, size)


# ---- S3 and the Census: names and values are taken; reading needs a network ----------------------------------------
@follows(
    "pipeline/data/soma/s3_errors.py: check ingest.source.uri, and ingest.source.s3.endpoint if the bucket",
    "pipeline/data/soma/s3_errors.py: set ingest.source.region to the region of the bucket",
    "pipeline/data/soma/s3_errors.py: read a copy on disk: ingest.source.uri: <folder>",
    "pipeline/data/soma/s3_errors.py: lower ingest.source.s3.max_parallel",
    "pipeline/data/soma/s3_errors.py: check ingest.source.uri",
    "pipeline/data/soma/s3_errors.py: set ingest.source.anonymous: false",
)
def a_bucket_cannot_be_read(case: Case) -> None:
    from pipeline.data.soma.s3_errors import Failure, explain

    job = pipeline_on(case, {"type": "soma", "uri": "s3://bucket/cells", "anonymous": True, "region": "us-east-1"})
    given = {"uri": "s3://other/cells", "s3.endpoint": "http://127.0.0.1:9000", "region": "eu-west-1",
             "s3.max_parallel": "2", "anonymous": "false"}  # fmt: skip
    kinds = {"no bucket": ["uri", "s3.endpoint"], "wrong region": ["region"], "unreachable": ["region", "s3.endpoint"],
             "busy": ["s3.max_parallel"], "other": ["uri"], "refused": ["anonymous"]}  # fmt: skip
    for kind, names in kinds.items():
        unsigned = {"vfs.s3.no_sign_request": "true"}
        said = explain("s3://bucket/cells", unsigned, Failure(kind, "why"), tries=1, seconds=0)  # type: ignore[arg-type]
        for name in names:
            done("validate", job, f"{named(said, f'ingest.source.{name}')}={given[name]}")
    copy = setting(explain("s3://b/c", {}, Failure("unreachable", ""), tries=1, seconds=0), "ingest.source.uri")
    local = pipeline_on(case, {"type": "soma", "uri": "s3://bucket/cells"})
    done("validate", local, copy.replace("<folder>", str(case.folder)))


@follows(
    "pipeline/data/sources/census.py: or read a copy with ingest.source: {type: soma, uri: <copy>/census_data/…}",
    "pipeline/data/sources/open.py: pin ingest.source.version: {}.",
)
def the_census_cannot_be_reached_or_moves_on(case: Case) -> None:
    from pipeline.config.ingest import CensusSource
    from pipeline.data.sources import census
    from pipeline.data.sources import open as opening

    job = pipeline_on(case, {"type": "census", "version": "stable"})

    def absent(*_: Any, **__: Any) -> Any:
        raise OSError("no network")

    with case.patch.context() as patch:
        patch.setattr("cellxgene_census.get_census_version_directory", absent)
        said = message(census.locate_census, CensusSource(type="census", version="stable"), sleep=lambda _: None)
    copy = setting(said.partition("or read a copy with")[2], "ingest.source")
    done("validate", job, copy.replace("<copy>", "/data").replace("…", "homo_sapiens"))
    store = SimpleNamespace(uri="s3://census", tiledb_config={})
    with case.patch.context() as patch:
        found = SimpleNamespace(version="2025-01-30", store=store)
        patch.setattr(census, "locate_census", lambda _: found)
        patch.setattr(opening, "replace", lambda x, **_: x)
        [note] = opening._census(CensusSource(type="census", version="stable")).notes
    done("validate", job, setting(note, "ingest.source.version"))


# ---- which job comes first -----------------------------------------------------------------------------------------
@follows(
    "pipeline/workflow/schedule.py: scldm run JOB.yaml, a job file of kind: {}",
    "pipeline/workflow/schedule.py: scldm run {}",
    "pipeline/workflow/schedule.py: or name a finished one: inputs.<stage>=<folder>",
)
def inputs_must_be_made_first(case: Case) -> None:
    folder = case.folder / "my jobs"
    job = write_job(folder / "encode.yaml", kind="encode")
    write_job(folder / "ingest.yaml", kind="ingest", source=SYNTHETIC)
    said = refused("run", job)
    assert "a job file of kind: train_vae" in said
    write_job(folder / "train_vae.yaml", kind="train_vae")
    said = refused("run", job)
    for stage in ("ingest", "train_vae"):
        line = next(line for line in said.splitlines() if line.strip().startswith("scldm run") and stage in line)
        program, *words = shlex.split(line)
        assert program == "scldm"
        done("plan", *words[1:])
    made = finished(case.folder / "elsewhere" / "train_vae" / "v1", {})
    assert "or name a finished one: inputs.<stage>=<folder>" in said
    after = refused("run", job, f"inputs.train_vae={made}")
    assert "train_vae: needed by" not in after


def finished(folder: Path, inputs: dict[str, str]) -> Path:
    """A finished stage of two levels under a pipeline's folder, as far as its manifest goes."""
    folder.mkdir(parents=True)
    facts = (
        {"n_genes": 10, "n_cells": {"train": 80, "validation": 20, "test": 20}}
        if folder.parent.name == "ingest"
        else {}
    )
    write_manifest(Manifest(folder.parent.name, folder.name, str(folder), {}, inputs, facts, 1.0, 1.0))
    return folder


@follows("pipeline/workflow/schedule.py: Make {} again ({}), or name the older one: inputs.{}={}")
def inputs_were_not_made_from_each_other(case: Case) -> None:
    runs = case.folder / "runs" / "demo"
    older = finished(runs / "ingest" / "v1", {})
    finished(runs / "train_vae" / "v1", {"ingest": "v1"})
    newer = finished(runs / "ingest" / "v2", {})
    write_job(case.folder / "train_vae.yaml", kind="train_vae")
    job = write_job(case.folder / "encode.yaml", kind="encode", inputs={"ingest": str(newer)})
    said = refused("plan", job)
    done("plan", *command(said.partition(")")[0].partition("again (")[2], "scldm run")[1:])
    chosen = setting(said, "inputs.ingest")
    assert chosen.partition("=")[2] == str(older)
    code, after = run("plan", job, chosen)
    assert "was made from" not in other(said, after), code


# ---- presets, faults, doctor ---------------------------------------------------------------------------------------
@follows("pipeline/cli/models.py: # Set train_vae.train.max_steps and train_flow.train.max_steps")
def a_preset_leaves_the_steps_open(case: Case) -> None:
    import yaml

    said = done("presets", "dentate_gyrus")
    job = pipeline(case, **yaml.safe_load(said))
    names = [named(said, f"{stage}.train.max_steps") for stage in ("train_vae", "train_flow")]
    done("validate", job, *(f"{name}=200" for name in names))


@follows(
    "pipeline/core/faults.py: `scldm faults` lists the points",
    'pipeline/cli/cluster.py: for example {}="checkpoint.after_shard:rank=1:n=2:kill" scldm run jobs/demo.yaml',
)
def a_fault_point_that_does_not_exist(case: Case) -> None:
    from pipeline.core import faults

    with case.patch.context() as patch:
        patch.setenv(faults.VARIABLE, "checkpoint.never:kill")
        job = pipeline(case)
        said = refused("validate", job)
        listed = done(*command(said, "scldm faults"))
    variable, *words = shlex.split(listed.strip().splitlines()[-1].partition("for example ")[2])
    faults.parse(variable.partition("=")[2])
    assert words == ["scldm", "run", "jobs/demo.yaml"]
    done("validate", ROOT / words[2])


@follows(
    "pipeline/cli/doctor/machine.py: or set resources.gpus_per_worker=0",
    "pipeline/cli/doctor/machine.py: on every node the same: output=/shared/runs",
    "pipeline/cli/doctor/machine.py: scldm plan says how much",
    "pipeline/cli/doctor/network.py: or unset tracking.uri: training continues and sends later",
)
def doctor_finds_fault_with_a_job(case: Case) -> None:
    from pipeline.cli.common import load
    from pipeline.cli.doctor import machine, network
    from pipeline.cli.doctor.report import requirements_of

    for name in ("RAY_ADDRESS", "RAY_API_SERVER_ADDRESS", "MLFLOW_TRACKING_URI"):
        case.patch.delenv(name, raising=False)
    (case.folder / "file").touch()
    job = pipeline(case, resources={"gpus_per_worker": 1}, tracking={"uri": "http://127.0.0.1:9"}, output="file/runs")

    def failing(*settings: str) -> dict[str, str]:
        requirements = requirements_of(load(job, list(settings)))
        checks = (machine.gpus, machine.disk, machine.storage, network.mlflow)
        return {found.check: found.fix for found in (check(requirements) for check in checks) if found.status == "fail"}

    with case.patch.context() as patch:
        patch.setattr(machine, "LEAST_FREE", 1e18)
        fixes = failing()
    less = setting(fixes["gpus"], "resources.gpus_per_worker")
    place = setting(fixes["storage"], "output").replace("/shared", str(case.folder))
    store = f"{named(fixes['mlflow'], 'tracking.uri')}=null"
    assert not {"gpus", "storage", "mlflow"} & set(failing(less, place, store))
    plan = command(fixes["disk"].removesuffix(" says how much"), "scldm plan")
    done(*plan, job, less, place, store)
