"""Solves the trajectories that a distilled flow is trained on, once, and keeps them in shards.

A trajectory goes from noise to latents under some labels, with the teacher's guidance; it needs no cell. Its labels are
drawn from the combinations that the teacher was trained on, which the model folder lists with their numbers of cells
(`library_size.json`). Their probabilities are as the square root of these numbers, so that rare classes are learned
too; some labels are dropped, as in the teacher's training, because cells are generated without them as well.

Trajectory number k is a function of (teacher, settings, seed, k): its noise comes from its own counters, and the
network sees whole tiles, as in generation (`scldm.generation.cell_maker`). A shard that was not committed is solved
again, to the same numbers.

Shape letters: b trajectories, n jumps, m latent tokens, e latent width, r distinct conditions.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from pipeline.config.job import DistilConfig
from pipeline.core.faults import arm
from pipeline.core.shards import CommitPoints, Record, ShardStore
from pipeline.data.loading.blocks import LABEL, RECORD_BATCH_ROWS
from scldm.data.library_size import LibrarySizes, condition_key
from scldm.data.vocabulary import Vocabulary
from scldm.errors import InputError
from scldm.generation.request import Request, RequestRow

POINTS = CommitPoints("distil.before_rename", "distil.before_record", "distil.after_record")
DRAWN, NOISE = 41, 14  # streams of randomness: of labels, and of a trajectory's noise
MOST_COMBINATIONS = 1_000_000  # of all labels' classes, that are looked up
Condition = dict[str, str | None]


@dataclass(frozen=True)
class Part:
    """Trajectories of one shard."""

    split: str  # train or validation
    number: int
    start: int  # number of its first trajectory
    stop: int

    @property
    def name(self) -> str:
        """File name of the shard."""
        return f"{self.split}-{self.number:05d}.arrow"


@dataclass(frozen=True)
class TrajectorySpec:
    """What an actor needs to solve any shard; picklable."""

    teacher: Path  # model folder
    folder: Path  # of the shards; exists
    config: DistilConfig
    conditions: tuple[Condition, ...]  # distinct, (r,)
    rows: np.ndarray  # condition of each trajectory, (all of them,)
    parts: tuple[Part, ...]
    seed: int
    threads: int  # of torch
    fault: str  # faults to arm, see `pipeline.core.faults`


def parts_of(config: DistilConfig) -> tuple[Part, ...]:
    """Cut the trajectories of a job into shards: those that are trained on, then those that are held out."""
    found = []
    start = 0
    for split, n in (("train", config.trajectories), ("validation", config.train.validation_cells)):
        for k, first in enumerate(range(start, start + n, config.shard_size)):
            found.append(Part(split, k, first, min(first + config.shard_size, start + n)))
        start += n
    return tuple(found)


# ---- labels --------------------------------------------------------------------------------------------------------
def combinations(vocabulary: Vocabulary, sizes: LibrarySizes) -> tuple[list[Condition], np.ndarray]:
    """Return the combinations of labels that a model was trained on, and their numbers of cells, (r,).

    Where a model does not record them, as one that was imported, every combination counts as one cell.

    Raises:
        InputError: There are too many classes to look all combinations up.
    """
    labels = vocabulary.labels
    if not labels:
        return [{}], np.ones(1)
    if (n := math.prod(len(x.classes) for x in labels)) > MOST_COMBINATIONS:
        raise InputError(
            f"distil: {n:,} combinations of {', '.join(x.name for x in labels)} are possible, and at most "
            f"{MOST_COMBINATIONS:,} can be looked up; distil a flow with fewer labels"
        )
    names = [x.name for x in labels]
    every: list[Condition] = [
        dict(zip(names, values, strict=True)) for values in itertools.product(*(x.classes for x in labels))
    ]
    found = [(c, sizes.table[key].n_cells or 1) for c in every if (key := condition_key(c)) in sizes.table]
    found = found or [(c, 1) for c in every]
    return [c for c, _ in found], np.array([n for _, n in found], dtype=np.float64)


def drawn_conditions(
    vocabulary: Vocabulary, sizes: LibrarySizes, n: int, *, label_dropout: float, seed: int
) -> tuple[tuple[Condition, ...], np.ndarray]:
    """Draw the labels of n trajectories: the distinct conditions, and which of them each has, (n,).

    Args:
        label_dropout: Probability that a trajectory has no label, and else that it lacks a label.
    """
    known, n_cells = combinations(vocabulary, sizes)
    rng = np.random.Generator(np.random.Philox(key=np.array([seed, DRAWN], np.uint64)))
    chance = np.sqrt(n_cells)
    own = rng.choice(len(known), size=n, p=chance / chance.sum())
    names = [x.name for x in vocabulary.labels]
    coins = rng.random((n, 1 + len(names)))
    dropped = (coins[:, :1] < label_dropout) | (
        coins[:, 1:] < (label_dropout if len(names) > 1 else 0.0)
    )  # (n, labels)
    numbers: dict[tuple[str | None, ...], int] = {}
    rows = np.empty(n, dtype=np.int64)
    for i, (k, without) in enumerate(zip(own.tolist(), dropped.tolist(), strict=True)):
        values = tuple(None if gone else known[k][x] for x, gone in zip(names, without, strict=True))
        rows[i] = numbers.setdefault(values, len(numbers))
    return tuple(dict(zip(names, values, strict=True)) for values in numbers), rows


# ---- shards --------------------------------------------------------------------------------------------------------
class TrajectorySolver:
    """A Ray Data actor that solves shards; can be called without Ray, to the same effect."""

    def __init__(self, spec: TrajectorySpec):
        import torch

        from scldm.checkpoints.native import load_flow
        from scldm.generation.cell_maker import CPU_TILE, GPU_TILE
        from scldm.generation.recipe import recipe_of
        from scldm.generation.request import Settings

        arm(spec.fault)
        torch.set_num_threads(spec.threads)
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.tile = CPU_TILE if self.device.type == "cpu" else GPU_TILE
        self.spec, self.store = spec, ShardStore(spec.folder, POINTS)
        self.flow = load_flow(spec.teacher, weights=spec.config.weights, device=self.device)
        request = Request(tuple(RequestRow(c, 1) for c in spec.conditions))
        self.recipe = recipe_of(
            request, Settings(spec.config.guidance), self.flow.vocabulary, self.flow.library_sizes,
            self.flow.dit.strategy, counts=False,
        )  # fmt: skip

    def __call__(self, shards: pa.Table) -> pa.Table:
        return pa.Table.from_pylist([self.make(row["shard"]) for row in shards.to_pylist()])

    def make(self, shard: int) -> Record:
        """Solve and commit a shard, by its place among the parts; return its record."""
        part = self.spec.parts[shard]

        def write(path: Path) -> dict[str, Any]:
            table = self.solved(part.start, part.stop)
            with pa.ipc.new_file(path, table.schema) as writer:
                writer.write_table(table, max_chunksize=RECORD_BATCH_ROWS)
            return {"split": part.split, "n_cells": len(table)}

        return self.store.commit(part.name, write)

    def solved(self, start: int, stop: int) -> pa.Table:
        """Return trajectories start .. stop - 1, with the columns of a latent cache: `latent` holds n + 1 states."""
        firsts = range(start - start % self.tile, stop, self.tile)
        states = np.concatenate([self._tile(first) for first in firsts])[start - firsts[0] :][: stop - start]
        ids = np.arange(start, stop, dtype=np.int64)
        rows = self.spec.rows[ids]
        return pa.table({
            "soma_joinid": ids,
            **{LABEL + k: pa.array(v[rows].astype(np.int32)) for k, v in self.recipe.conditions.items()},
            "log_library_size": pa.array(np.zeros(len(ids), np.float32)),
            "latent": pa.FixedSizeListArray.from_arrays(pa.array(states.reshape(-1)), states.shape[1]),
        })  # fmt: skip

    def _tile(self, first: int) -> np.ndarray:
        """Solve a whole tile, (b, (n + 1) m e) float32. Numbers past the last trajectory fill it with the last one's
        labels."""
        import torch

        from scldm.flow.distilled import teacher_states
        from scldm.generation.counter_random import normals

        ids = np.arange(first, first + self.tile, dtype=np.int64)
        rows = self.spec.rows[np.minimum(ids, len(self.spec.rows) - 1)]
        shape = (self.flow.n_latent_tokens, self.flow.latent_width)
        noise = torch.from_numpy(normals(ids, shape[0] * shape[1], seed=self.spec.seed, stream=NOISE))
        states = teacher_states(
            self.flow.dit, noise.unflatten(1, shape).to(self.device),
            {k: torch.as_tensor(v[rows], device=self.device) for k, v in self.recipe.conditions.items()},
            self.flow.path, evaluations=self.spec.config.evaluations, steps=self.spec.config.teacher_steps,
            scale={k: torch.as_tensor(v[rows], device=self.device) for k, v in self.recipe.scale.items()} or 1.0,
        )  # fmt: skip
        if not torch.isfinite(states).all():
            raise FloatingPointError(f"trajectories {first} to {first + self.tile - 1} are not finite; the flow is not "
                                     "usable")  # fmt: skip
        return states.flatten(1).float().cpu().numpy()
