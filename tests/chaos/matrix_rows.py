"""The fault matrix: what is done to a run, and what is promised.

T: processes and nodes. C: checkpoints. N: numbers. G: generation. M: MLflow. D: input data. S: security.
"""

from __future__ import annotations

ROWS: dict[str, str] = {
    "T1": "SIGKILL of a training worker in a step: at most an interval is done again, the weights are the same",
    "T2": "the same for worker 0, which writes manifests, averages and MLflow's points",
    "T3": "a node dies: its workers start elsewhere, or fewer go on with the same cells in the same order",
    "T4": "the same step kills each time: the run ends with exit code 1 and says how often and where",
    "T5": "a node gives notice: a checkpoint at that very step, no step lost, no failure counted",
    "T6": "`scldm stop`, `ray job stop`, SIGTERM: a checkpoint at that very step; the same command goes on",
    "T7": "the head is lost, all nodes and the driver with it: the same command goes on in a new cluster",
    "T8": "SIGKILL of the driver: the same command goes on",
    "T9": "a worker freezes (SIGSTOP): stacks are written, the group starts again",
    "T10": "a slow worker: training waits for it, says which it is, and ends the same",
    "T11": "cells that no number of workers divides: equal steps everywhere, each cell once an epoch",
    "T12": "a worker has too little memory: which one, in which step, and the settings that mend it; too little "
    "room in Ray's object store: the settings that mend it",
    "T13": "two runs on one folder: the second is refused with the owner and its age",
    "T14": "clocks of workers are days apart and jump: the same checkpoints, weights and cells",
    "C1": "SIGKILL at every fault point of step, checkpoint, retention, copies, cache and latents: what is left "
    "verifies, at most an interval is done again, weights and cells are the same",
    "C2": "a file cut, flipped, deleted or swapped: that checkpoint is passed over and named, the one before used",
    "C3": "a manifest cut or flipped anywhere: passed over; of a newer version: an error that says to upgrade",
    "C4": "Ray's own snapshots of a run are damaged: they are not needed, the same command goes on",
    "C5": "a full disk: the checkpoint is given up, the ones before it stay, training goes on; the last one must fit",
    "C6": "a second place that cannot be written: refused before anything is computed",
    "C7": "a slow second place: no step waits; at most one copy flies and one waits",
    "C8": "two workers, one, two: the same cells in the same order, weights to rounding",
    "C9": "fifty checkpoints: three folders stay, always one that verifies, never without the best",
    "C10": "a checkpoint, latents or models of another configuration: refused, with both names",
    "C11": "a malicious pickle: never run",
    "C12": "models, a checkpoint and a job that version 0.1.0 wrote: they load, with the same numbers",
    "N1": "a loss or gradient that is not finite, on one worker: all leave the step out, weights stay equal",
    "N2": "it is never finite: the run ends after train.max_skipped steps and names the cells; no such weight is saved",
    "N3": "a loss a million times too large: clipped, and training comes to the loss of a run without it",
    "N4": "bf16 against fp32 on the CPU: within 0.02 of each weight over 12 steps",
    "N5": "a model that gives no numbers: generation ends with the shard and the cells, and nothing is written",
    "G1": "SIGKILL of an actor or its node in a shard: the same bytes",
    "G2": "SIGKILL of the driver at every fault point of generation, then the same command: the same bytes",
    "G3": "other batches, shards and numbers of actors: the same cells",
    "G4": "a reader while shards are written: sees none of them before the manifest lists them",
    "G5": "a full disk, a stale file handle: no damaged file under a final name; the same command goes on",
    "G6": "a shard lost or damaged after its commit: made again, and it alone",
    "G7": "no cells, one cell, a number that no shard size divides, a billion",
    "G8": "another request, other inputs: a folder of its own; shards of another input do not count",
    "G9": "five times as many cells: the same memory, to a tenth",
    "M1": "MLflow is down at the start",
    "M2": "MLflow is killed in the middle and comes back",
    "M3": "MLflow accepts and never answers",
    "M4": "MLflow answers 500, 429, slowly",
    "M5": "MLflow refuses; the run was deleted",
    "M6": "a resume with other settings",
    "M7": "a flood of points",
    "M8": "odd numbers, names and lengths",
    "M9": "the artifact store takes nothing",
}  # fmt: skip

DATA = """negative-counts non-integer non-finite duplicate-gene-ids duplicate-obs-names vocabulary-missing symbols
versioned-ids empty-cells empty-genes zero-cells one-cell fewer-cells-than-batch label-absent label-missing
unknown-category-at-generation category-in-validation-only label-types label-mixed layout x-absent above-2^24
library-size-outlier unsorted-indices explicit-zeros corrupt-h5 corrupt-10x external-link huge-declared
zarr-pickle-codec zarr-missing-chunk soma-missing-fragment soma-wrong-time path-spaces-unicode directory-for-file
other-format census-absent filter-matches-nothing s3-failures tenx soma-sound round-trip
flipped-bytes fuzz"""
"""Rows D: what may be wrong with cells, or with the place that they lie in."""
ROWS |= {f"D:{name}": f"cells: {name.replace('-', ' ')}" for name in DATA.split()}

ROWS |= {
    "S1": "what we ship is closed: a token wherever a dashboard listens, MLflow on this machine or for hosts it names",
    "S2": "a job without the cluster's token is refused",
    "S3": "hostile YAML: refused with its line, within a second and 200 MB",
    "S4": "names and paths that lead elsewhere or into a shell: refused, or quoted",
    "S5": "secrets of the environment are in no log, record, package or MLflow store",
    "S6": "the package that Ray sends holds no data, no checkpoints, no .env and no .git",
    "S7": "markup in labels and gene names is shown as text",
    "S8": "dependencies: pinned, licences read, holes asked for",
    "S9": "versions with known holes are below the floors",
}

NOT_COVERED: dict[str, str] = {}  # row -> why there is no test

PARTLY: dict[str, str] = {
    "N2": "the run is not rolled back and tried again with other cells: a step that was left out changed nothing",
    "N4": "100 steps on a GPU are for a machine that has one",
    "N5": "the shard is not tried again: it would be the same numbers",
    "G7": "a billion cells need no --yes; `scldm plan` says what they take, and more are refused",
}
