"""Every fault point: its name, the module that passes it, and what a process that dies there leaves behind.

A contract test holds this list and the calls in the code together.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class FaultPoint:
    where: str  # module
    what: str
    has_step: bool = False  # whether `step=` can name one


POINTS: dict[str, FaultPoint] = {
    # ---- training ------------------------------------------------------------------------------------------------
    "training.before_step": FaultPoint(
        "pipeline.training.loop", "a step begins: its cells are there, nothing is computed; steps count from 0", True
    ),
    "training.before_update": FaultPoint(
        "pipeline.training.loop", "the gradients of a step are there, the weights are those of before", True
    ),
    "training.after_step": FaultPoint(
        "pipeline.training.loop", "weights and average are those after a step; no checkpoint holds it", True
    ),
    "training.after_checkpoint": FaultPoint(
        "pipeline.training.loop", "a step is in a checkpoint, and Ray has not heard of it", True
    ),
    "training.before_export": FaultPoint(
        "pipeline.training.loop", "all steps are done and saved, the model's folder is not written"
    ),
    # ---- checkpoints ---------------------------------------------------------------------------------------------
    "checkpoint.before_save": FaultPoint(
        "pipeline.training.checkpoints.manager", "a checkpoint is due; no folder has been made for it"
    ),
    "checkpoint.before_shard": FaultPoint(
        "pipeline.training.checkpoints.manager", "a worker is about to write one of its files"
    ),
    "checkpoint.in_shard": FaultPoint(
        "pipeline.training.engine.state_files", "a file of a checkpoint is in the middle of being written, not flushed"
    ),
    "checkpoint.after_shard": FaultPoint(
        "pipeline.training.checkpoints.manager",
        "a worker has written and flushed one of its files; others may be missing",
    ),
    "checkpoint.before_manifest": FaultPoint(
        "pipeline.training.checkpoints.manifest", "all files of all workers are there; the manifest is not"
    ),
    "checkpoint.after_manifest": FaultPoint(
        "pipeline.training.checkpoints.manifest", "a checkpoint is committed; the other workers have not heard of it"
    ),
    "checkpoint.before_remove": FaultPoint(
        "pipeline.training.checkpoints.manifest", "an old checkpoint, still whole, is about to be removed"
    ),
    "checkpoint.in_remove": FaultPoint(
        "pipeline.training.checkpoints.manifest", "an old checkpoint has lost its manifest, and still has its files"
    ),
    "checkpoint.after_remove": FaultPoint("pipeline.training.checkpoints.manifest", "an old checkpoint is gone"),
    # ---- their copies --------------------------------------------------------------------------------------------
    "upload.before_file": FaultPoint(
        "pipeline.training.checkpoints.remote",
        "a file is about to be copied to the second place; the manifest is the last",
    ),
    "upload.before_rename": FaultPoint(
        "pipeline.training.checkpoints.remote",
        "a copied file is whole, under its temporary name (folders only, not s3)",
    ),
    "upload.after_file": FaultPoint(
        "pipeline.training.checkpoints.remote", "a file is in the second place; others may be missing"
    ),
    "upload.in_remove": FaultPoint(
        "pipeline.training.checkpoints.remote",
        "an old checkpoint of the second place has lost its manifest, not its files",
    ),
    "download.before_rename": FaultPoint(
        "pipeline.training.checkpoints.remote", "a file from the second place is whole here, under its temporary name"
    ),
    # ---- stages --------------------------------------------------------------------------------------------------
    "stage.before_run": FaultPoint(
        "pipeline.workflow.runner", "a stage has its folder and its lock, and has done nothing"
    ),
    "stage.before_manifest": FaultPoint(
        "pipeline.workflow.runner", "all output of a stage is there; its manifest is not"
    ),
    "stage.after_manifest": FaultPoint(
        "pipeline.workflow.runner", "a stage is finished; its run in MLflow is still open"
    ),
    "record.before_rename": FaultPoint(
        "pipeline.core.files", "any manifest or record: it is whole and flushed, under its temporary name"
    ),
    # ---- shards --------------------------------------------------------------------------------------------------
    "cache.before_rename": FaultPoint(
        "pipeline.data.loading.cache_writer", "a shard of the cache is whole, under its temporary name"
    ),
    "cache.before_record": FaultPoint(
        "pipeline.data.loading.cache_writer", "the same: it has its name, and no record yet"
    ),
    "cache.after_record": FaultPoint("pipeline.data.loading.cache_writer", "the same: it and its record are committed"),
    "cache.before_manifest": FaultPoint(
        "pipeline.data.loading.cache_writer", "all shards of the cache are committed, its manifest is not written"
    ),
    "encode.before_rename": FaultPoint(
        "pipeline.stages.encode", "a shard of latents is whole and on disk, under its temporary name"
    ),
    "encode.before_record": FaultPoint("pipeline.stages.encode", "the same: it has its name, and no record yet"),
    "encode.after_record": FaultPoint("pipeline.stages.encode", "the same: it and its record are committed"),
    "generate.after_batch": FaultPoint(
        "pipeline.inference.generator", "an actor has handed a tile of cells to the writer of its shard"
    ),
    "generate.before_rename": FaultPoint(
        "pipeline.inference.generator", "a shard is whole and on disk, under its temporary name"
    ),
    "generate.before_record": FaultPoint("pipeline.inference.generator", "a shard has its name, and no record yet"),
    "generate.after_record": FaultPoint("pipeline.inference.generator", "a shard and its record are committed"),
    "generate.before_manifest": FaultPoint(
        "pipeline.stages.generate", "all shards are committed, neither index nor the stage's manifest is written"
    ),
    "cells.before_rename": FaultPoint(
        "pipeline.inference.applier",
        "embed, reconstruct, perturb, log_likelihood: a shard is whole, under its temporary name",
    ),
    "cells.before_record": FaultPoint(
        "pipeline.inference.applier", "the same: a shard has its name, and no record yet"
    ),
    "cells.after_record": FaultPoint("pipeline.inference.applier", "the same: a shard and its record are committed"),
    "cells.before_manifest": FaultPoint(
        "pipeline.inference.apply_job", "the same: all shards and the index are there, the stage's manifest is not"
    ),
}
