"""List every fault point: its name, the module that passes it, and what a process that dies there leaves behind.

A contract test keeps this list and the calls in the code in step.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class FaultPoint:
    """A place in the code at which a fault can be triggered."""

    where: str  # module
    what: str  # state at that point
    has_step: bool = False  # whether it knows the training step, for `step=`


POINTS: dict[str, FaultPoint] = {
    # ---- training ------------------------------------------------------------------------------------------------
    "training.before_step": FaultPoint(
        "pipeline.training.loop", "a step begins: its batch is loaded and nothing is computed; steps count from 0", True
    ),
    "training.before_update": FaultPoint(
        "pipeline.training.loop", "gradients are computed, weights are not updated yet", True
    ),
    "training.after_step": FaultPoint(
        "pipeline.training.loop", "weights and average are updated; the step is in no checkpoint", True
    ),
    "training.after_checkpoint": FaultPoint(
        "pipeline.training.loop", "a step is in a checkpoint that is not reported to Ray yet", True
    ),
    "training.before_export": FaultPoint(
        "pipeline.training.loop", "all steps are done and saved; the model is not exported yet"
    ),
    "distil.before_rename": FaultPoint(
        "pipeline.stages.training.trajectories", "a shard of trajectories is complete under its temporary name"
    ),
    "distil.before_record": FaultPoint(
        "pipeline.stages.training.trajectories", "a shard of trajectories has its name and no record"
    ),
    "distil.after_record": FaultPoint("pipeline.stages.training.trajectories", "a shard of trajectories is committed"),
    # ---- checkpoints ---------------------------------------------------------------------------------------------
    "checkpoint.before_save": FaultPoint(
        "pipeline.training.checkpoints.manager", "a checkpoint is due; its folder does not exist yet"
    ),
    "checkpoint.before_shard": FaultPoint(
        "pipeline.training.checkpoints.manager", "a worker is about to write one of its files"
    ),
    "checkpoint.in_shard": FaultPoint(
        "pipeline.training.engine.state_files", "a checkpoint file is partly written and not flushed"
    ),
    "checkpoint.after_shard": FaultPoint(
        "pipeline.training.checkpoints.manager",
        "a worker has written and flushed one of its files; others may be missing",
    ),
    "checkpoint.before_manifest": FaultPoint(
        "pipeline.training.checkpoints.manifest",
        "all workers have written their files; the manifest is not written",
    ),
    "checkpoint.after_manifest": FaultPoint(
        "pipeline.training.checkpoints.manifest", "a checkpoint is committed; the other workers do not know yet"
    ),
    "checkpoint.before_remove": FaultPoint(
        "pipeline.training.checkpoints.manifest", "an old, complete checkpoint is about to be removed"
    ),
    "checkpoint.in_remove": FaultPoint(
        "pipeline.training.checkpoints.manifest", "an old checkpoint has lost its manifest and still has its files"
    ),
    "checkpoint.after_remove": FaultPoint("pipeline.training.checkpoints.manifest", "an old checkpoint is removed"),
    # ---- their copies --------------------------------------------------------------------------------------------
    "upload.before_file": FaultPoint(
        "pipeline.training.checkpoints.remote",
        "a file is about to be copied to remote storage; the manifest is copied last",
    ),
    "upload.before_rename": FaultPoint(
        "pipeline.training.checkpoints.remote",
        "a copied file is complete under its temporary name (file systems only, not s3)",
    ),
    "upload.after_file": FaultPoint(
        "pipeline.training.checkpoints.remote", "a file is in remote storage; others may be missing"
    ),
    "upload.in_remove": FaultPoint(
        "pipeline.training.checkpoints.remote",
        "an old checkpoint in remote storage has lost its manifest and still has its files",
    ),
    "download.before_rename": FaultPoint(
        "pipeline.training.checkpoints.remote", "a file from remote storage is complete under its temporary name"
    ),
    # ---- stages --------------------------------------------------------------------------------------------------
    "stage.before_run": FaultPoint(
        "pipeline.workflow.runner", "a stage has its folder and its lock, and has done nothing yet"
    ),
    "stage.before_manifest": FaultPoint(
        "pipeline.workflow.runner", "all output of a stage is written; its manifest is not"
    ),
    "stage.after_manifest": FaultPoint(
        "pipeline.workflow.runner", "a stage is finished; its run in MLflow is still open"
    ),
    "record.before_rename": FaultPoint(
        "pipeline.core.files", "any manifest or record: it is complete and flushed under its temporary name"
    ),
    # ---- shards --------------------------------------------------------------------------------------------------
    "cache.before_rename": FaultPoint(
        "pipeline.data.loading.cache_writer", "a cache shard is complete under its temporary name"
    ),
    "cache.before_record": FaultPoint(
        "pipeline.data.loading.cache_writer", "the same: it has its final name and no record yet"
    ),
    "cache.after_record": FaultPoint("pipeline.data.loading.cache_writer", "the same: it and its record are committed"),
    "cache.before_manifest": FaultPoint(
        "pipeline.data.loading.cache_writer", "all cache shards are committed; the manifest is not written"
    ),
    "encode.before_rename": FaultPoint(
        "pipeline.stages.encode", "a shard of latents is complete and on disk under its temporary name"
    ),
    "encode.before_record": FaultPoint("pipeline.stages.encode", "the same: it has its final name and no record yet"),
    "encode.after_record": FaultPoint("pipeline.stages.encode", "the same: it and its record are committed"),
    "generate.after_batch": FaultPoint(
        "pipeline.inference.generator", "an actor has passed a tile of cells to the writer of its shard"
    ),
    "generate.before_rename": FaultPoint(
        "pipeline.inference.generator", "a shard is complete and on disk under its temporary name"
    ),
    "generate.before_record": FaultPoint("pipeline.inference.generator", "a shard has its final name, no record yet"),
    "generate.after_record": FaultPoint("pipeline.inference.generator", "a shard and its record are committed"),
    "generate.before_manifest": FaultPoint(
        "pipeline.stages.generate", "all shards are committed; neither the index nor the stage's manifest is written"
    ),
    "cells.before_rename": FaultPoint(
        "pipeline.inference.applier",
        "embed, reconstruct, perturb, log_likelihood: a shard is complete under its temporary name",
    ),
    "cells.before_record": FaultPoint(
        "pipeline.inference.applier", "the same: a shard has its final name, no record yet"
    ),
    "cells.after_record": FaultPoint("pipeline.inference.applier", "the same: a shard and its record are committed"),
    "cells.before_manifest": FaultPoint(
        "pipeline.inference.apply_job", "the same: all shards and the index are written; the stage's manifest is not"
    ),
}
