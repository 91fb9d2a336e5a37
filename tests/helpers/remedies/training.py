"""Advice of a training that stops: steps that are skipped, checkpoints that do not verify, memory that runs out."""

from __future__ import annotations

import json
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
    parse,
    parse_with,
    refused,
    run,
    setting,
    write_job,
)
from helpers.stages.committed import commit
from pipeline.config.io.loader import load_job
from pipeline.config.resources import CheckpointStorage

ROOT = Path(__file__).resolve().parents[3]


def settings_of(*overrides: str) -> Any:
    """The settings of a job that trains a VAE."""
    job = write_job(Path("train_vae.yaml"), kind="train_vae")
    done("validate", job, *overrides)
    return load_job(job, overrides)


# ---- steps ---------------------------------------------------------------------------------------------------------
@follows(
    "pipeline/training/callbacks/step_guard.py: lower train.optimizer.lr, or set train.non_finite=skip",
    "pipeline/training/callbacks/step_guard.py: lower train.optimizer.lr or train.optimizer.clip, or inspect these",
)
def a_loss_is_not_finite(case: Case) -> None:
    from pipeline.training.callbacks.step_guard import StepGuard

    losses: Any = SimpleNamespace(mean=float("nan"), n_non_finite=1, describe_cells=lambda: "worker 0: soma_joinid 3")
    said = stopped(StepGuard(settings_of("train.non_finite=stop").train), losses)
    skip = setting(said, "train.non_finite")
    guard = StepGuard(settings_of(skip, "train.max_skipped=2").train)
    assert "Skipped" in str(guard.record(1, losses, applied=False))
    said = stopped(guard, losses)
    settings_of(f"{named(said, 'train.optimizer.lr')}=1e-4", f"{named(said, 'train.optimizer.clip')}=0.5")
    named(said, "train.max_skipped")
    parse(*command(said.rstrip(")"), "scldm validate-data"), "cells.h5ad")


def stopped(guard: Any, losses: Any) -> str:
    from pipeline.training.state import TrainingStopped

    try:
        guard.record(1, losses, applied=False)
    except TrainingStopped as stop:
        return str(stop)
    raise AssertionError("training did not stop")


# ---- checkpoints ---------------------------------------------------------------------------------------------------
@follows(
    "pipeline/training/checkpoints/selection.py: or set checkpoints.strict_resume=false",
    "pipeline/training/checkpoints/manager.py: Set checkpoints.strict_resume=false to export the next best",
    "pipeline/training/checkpoints/manager.py: run again with train.export=last",
)
def a_checkpoint_is_damaged(case: Case) -> None:
    from pipeline.training.checkpoints.manager import CheckpointManager
    from pipeline.training.checkpoints.selection import CheckpointSelection

    kept, broken = commit(case.folder / "c", 4, loss=2.0), commit(case.folder / "c", 8, loss=1.0)
    (broken / "state.pt").write_bytes(b"WEIGHTS")

    def newest(storage: CheckpointStorage) -> Any:
        return CheckpointSelection(case.folder / "c", None, keep_best=1, strict=storage.strict_resume).newest()

    def best(storage: CheckpointStorage) -> Any:
        return CheckpointManager._select_best(SimpleNamespace(root=case.folder / "c", storage=storage))  # type: ignore

    for select in (newest, best):
        said = message(select, CheckpointStorage(strict_resume=True))
        settings = settings_of(setting(said, "checkpoints.strict_resume"))
        assert select(settings.checkpoints).folder == kept
    assert settings_of(setting(said, "train.export")).train.export == "last"
    (broken / "state.pt").rename(case.folder / "away")
    none = SimpleNamespace(root=case.folder, _select_on_rank_0=lambda _: None, _select_best=None)
    try:
        CheckpointManager.load_best(none)  # type: ignore[arg-type]
    except RuntimeError as error:
        settings_of(setting(str(error), "train.export"))


@follows("pipeline/training/checkpoints/manifest.py: or move this folder away to resume from the checkpoint before it")
def a_checkpoint_is_of_a_newer_version(case: Case) -> None:
    from pipeline.training.checkpoints import manifest

    kept, newer = commit(case.folder / "c", 4), commit(case.folder / "c", 8)
    path = newer / "MANIFEST.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "schema": manifest.SCHEMA + 1}))
    said = message(manifest.newest, case.folder / "c")
    Path(said.partition(" was written")[0]).rename(case.folder / "away")
    found, _ = manifest.newest(case.folder / "c")
    assert found is not None
    assert found.folder == kept


@follows("pipeline/training/checkpoints/remote.py: checkpoints.region and checkpoints.s3, or set it to null")
def checkpoints_cannot_be_uploaded(case: Case) -> None:
    from pipeline.training.checkpoints.remote import check_storage

    (case.folder / "file").touch()
    said = message(check_storage, CheckpointStorage(storage_path=str(case.folder / "file" / "there")), "run")
    check_storage(settings_of(f"{named(said, 'checkpoints.storage_path')}=null").checkpoints, "run")
    check_storage(settings_of(f"checkpoints.storage_path={case.folder / 'there'}").checkpoints, "run")
    settings_of("checkpoints.storage_path=s3://bucket/runs", f"{named(said, 'checkpoints.region')}=eu-west-1",
                f"{named(said, 'checkpoints.s3')}.endpoint=http://127.0.0.1:9000")  # fmt: skip


# ---- memory --------------------------------------------------------------------------------------------------------
@follows(
    "pipeline/training/out_of_memory.py: A worker computes {} cells at a time. Set {}; `scldm plan` estimates",
    "pipeline/training/out_of_memory.py: fewer workers (resources.workers)",
)
def a_worker_runs_out_of_memory(case: Case) -> None:
    from pipeline.training.out_of_memory import advice

    for on_gpu in (True, False):
        given = settings_of("resources.workers=2")
        said = advice(given.train, 16, "worker 0", "out of memory", on_gpu=on_gpu)
        advised = said.partition(". Set ")[2].partition(";")[0].split(", or ")
        for each in advised:
            settings_of("resources.workers=2", each) if "=" in each else named(each, "resources.workers")
        assert len(advised) > 1
    settings_of("resources.workers=1")
    parse(*command(said, "scldm plan"), "train_vae.yaml")


@follows("pipeline/planning/memory.py: no A100: lower train.feed.micro_batch_size, or take more workers")
def no_gpu_is_large_enough(case: Case) -> None:
    from pipeline.planning.memory import stage_lines

    train = settings_of().train
    said = "\n".join(stage_lines(10**9, train, 1, 1e12))
    train = settings_of(f"{named(said, 'train.feed.micro_batch_size')}=1").train
    assert train.feed.micro_batch_size == 1


@follows(
    "pipeline/data/loading/ray_source.py: set train.feed.block_rows={}",
    "pipeline/data/loading/ray_source.py: use fewer workers (resources.workers)",
    "pipeline/data/loading/ray_source.py: ray start --object-store-memory=BYTES --object-spilling-directory=FOLDER",
)
def blocks_do_not_fit_into_rays_memory(case: Case) -> None:
    from ray.exceptions import ObjectStoreFullError
    from ray.scripts.scripts import cli

    from pipeline.data.loading.blocks import NoRoom
    from pipeline.data.loading.ray_source import explain_full_store

    source: Any = SimpleNamespace(tile=2048, reader=SimpleNamespace(row_bytes=1000))
    said = ""
    try:
        with explain_full_store(source, [range(8192)]):  # type: ignore[list-item]
            raise ObjectStoreFullError("full")
    except NoRoom as error:
        said = str(error)
    assert settings_of(setting(said, "train.feed.block_rows")).train.feed.block_rows == 4096
    settings_of(f"{named(said, 'resources.workers')}=1")
    words = command(said.partition(", then RAY_ADDRESS")[0], "ray start")
    parse_with(cli, tuple(w.replace("BYTES", "100000000").replace("FOLDER", "/tmp") for w in words))


# ---- clusters: commands are parsed by the program that takes them; they run in tests/integration -------------------
@follows(
    "pipeline/cluster/submit.py: start one (scldm cluster start), forward its port (ray attach",
    "pipeline/cluster/submit.py: see scldm status",
    "pipeline/cli/doctor/network.py: scldm cluster start, or ray attach cluster/aws.yaml --port-forward 8265",
    "pipeline/cli/cluster.py:   ray job submit jobs/train_vae.yaml        or: scldm submit jobs/train_vae.yaml",
    "pipeline/cli/cluster.py: end it: scldm cluster stop",
    "pipeline/cluster/head.py: stop it with scldm cluster stop",
    "pipeline/cluster/head.py: scldm stop each of them first, or give --force",
    "pipeline/cluster/head.py: which cluster? Give --address host:6379",
    "pipeline/cluster/submit.py:   follow: scldm logs -f {}    stop: scldm stop {}",
    "pipeline/cluster/submit.py: To stop it: scldm stop {}",
    "pipeline/cluster/submit.py: the stop was requested: scldm status",
    "pipeline/cluster/submit.py: no job was sent to this cluster: scldm submit JOB",
    "pipeline/cluster/connect.py: use `scldm submit`, or set RAY_ADDRESS to host:port",
    "pipeline/cluster/connect.py: run it where they are (scldm submit), or ask for less",
    "pipeline/cluster/connect.py: , for example resources.gpus_per_worker=0",
    "pipeline/cluster/connect.py: `scldm doctor` checks the machine",
    "pipeline/cli/doctor/network.py: none; scldm cluster start makes one",
    "pipeline/cli/doctor/network.py: start it with RAY_AUTH_MODE=token (cluster/env.sh, scldm cluster start)",
)
def commands_of_a_cluster(case: Case) -> None:
    from ray.dashboard.modules.job.cli import job_cli_group
    from ray.scripts.scripts import cli

    from pipeline.cluster.submit import explain

    said = explain("http://127.0.0.1:9", Exception("refused"))
    attach = command(said.partition("), or give")[0], "ray attach")
    assert (ROOT / attach[1]).is_file()
    parse_with(cli, tuple(attach))
    parse_with(job_cli_group, ("submit", "jobs/train_vae.yaml"))
    assert (ROOT / "jobs/train_vae.yaml").is_file()
    named(said, "--address")
    for words in ("cluster start", "cluster stop", "cluster stop --force", "cluster drain --address host:6379",
                  "submit jobs/train_vae.yaml --address http://127.0.0.1:9", "status", "logs -f ID", "stop ID",
                  "doctor"):  # fmt: skip
        parse(*words.split())
    settings_of("resources.gpus_per_worker=0")


@follows("pipeline/cluster/submit.py: is not under --working-dir {}, which is all that the cluster gets")
def a_job_is_outside_of_what_is_sent(case: Case) -> None:
    from pipeline.cluster import submit

    settings_of()
    (case.folder / "code").mkdir()
    words = ("submit", "train_vae.yaml", "--address", "http://127.0.0.1:9", "--working-dir")
    said = refused(*words, "code")

    def no_server(*_: Any, **__: Any) -> Any:
        raise AssertionError("the job would be sent")

    with case.patch.context() as patch:
        patch.setattr(submit, "client", no_server)
        assert named(said, "--working-dir")
        code, after = run(*words, ".")
    assert (code, "the job would be sent" in after) == (1, True)
