"""The generate stage on a small pair of models, without Ray: the same code that actors run, in this process.

Also a program that chaos tests start and kill: `run_in_process`.
"""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch

from helpers.models.small_models import CELL_TYPES, DONORS, library_sizes, vocabulary, write_flow, write_vae
from pipeline.config.context import StageContext
from pipeline.config.job import GenerateConfig, ResourcesConfig
from pipeline.core import faults
from pipeline.core.files import write_json_atomic
from pipeline.core.lock import stage_lock
from pipeline.core.manifest import Manifest
from pipeline.inference.generator import Generator, GeneratorSpec
from pipeline.stages.generate import run
from scldm.data.vocabulary import LabelVocabulary
from scldm.errors import InputError

TESTS = Path(__file__).resolve().parents[2]
LABELS = (CELL_TYPES, DONORS)
# The server knows no path but that of the environment, and passes in silence over what it cannot import.
os.environ["PYTHONPATH"] = os.pathsep.join([str(TESTS), str(TESTS.parent), os.environ.get("PYTHONPATH", "")])
os.environ.setdefault("OMP_NUM_THREADS", "1")
CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["helpers.stages.generation_case"])
REFUSED = 2


class NoTracker:
    """Keeps what it is told."""

    def __init__(self) -> None:
        self.told: dict[str, float] = {}

    def metrics(self, values: dict[str, float], step: int) -> None:
        self.told |= values


def write_inputs(
    root: Path, labels: tuple[LabelVocabulary, ...] = LABELS, *, head: str = "nb_shared", **flow: Any
) -> dict[str, Manifest]:
    """Manifests of an ingest, a VAE with that head and a flow, as far as generate reads them."""
    ingest = root / "ingest"
    ingest.mkdir(parents=True)
    vocabulary(*labels).save(ingest / "vocabulary.json")
    library_sizes(*labels).save(ingest / "library_size.json")
    classes = {f"label:{x.name}": np.arange(4) // (k + 1) % len(x.classes) for k, x in enumerate(labels)}
    cells = {"soma_joinid": range(4), "split": "train", **classes}
    pd.DataFrame(cells).to_parquet(ingest / "cells.parquet")
    facts = {
        "vocabulary": "vocabulary.json", "library_size": "library_size.json", "cells": "cells.parquet", "digest": "abc",
        "n_cells": {"train": 4}, "n_genes": 6,
    }  # fmt: skip
    write_vae(root / "train_vae" / "model", *labels, head=head)
    write_flow(root / "train_flow" / "model", *labels, **flow)
    model = {"model": "model", "latent_shape": [3, 4]}
    return {
        "ingest": _manifest("ingest", ingest, facts),
        "train_vae": _manifest("train_vae", root / "train_vae", model),
        "train_flow": _manifest("train_flow", root / "train_flow", model),
    }


def _manifest(stage: str, folder: Path, facts: dict[str, Any]) -> Manifest:
    return Manifest(stage, "0", str(folder), {}, {}, facts, seconds=0, finished_at=0)


def local_pool(todo: list[int], spec: GeneratorSpec, context: StageContext) -> Iterator[dict[str, Any]]:
    """One actor, in this process."""
    actor = Generator(spec)
    for shard in todo:
        yield actor.make(shard)


def generate(folder: Path, inputs: dict[str, Manifest], pool: Any = local_pool, **config: Any) -> dict[str, Any]:
    """Run the stage under its lock and write its manifest, as the runner does. Its facts."""
    folder.mkdir(parents=True, exist_ok=True)
    context = StageContext(folder, inputs, seed=0, resources=ResourcesConfig(cpus_per_worker=1), tracker=NoTracker())
    with stage_lock(folder):
        facts = run(GenerateConfig.model_validate(config), context, pool)
        write_json_atomic(folder / "manifest.json", {"facts": facts})
    return facts


def hashes(folder: Path) -> dict[str, str]:
    """File -> sha256 of its bytes, of the shards that the manifest lists."""
    shards = json.loads((folder / "manifest.json").read_text())["facts"]["shards"]
    return {s["file"]: hashlib.sha256((folder / s["file"]).read_bytes()).hexdigest() for s in shards}


def run_in_process(folder: Path, inputs: dict[str, Manifest], fault: str = "", **config: Any) -> Any:
    """A process that generates; started. Its exit code is 2 if the job was refused."""
    process = CONTEXT.Process(target=_program, args=(folder, inputs, fault, config))
    process.start()
    return process


def _program(folder: Path, inputs: dict[str, Manifest], fault: str, config: dict[str, Any]) -> None:
    os.environ[faults.VARIABLE] = fault
    faults.arm()
    torch.set_num_threads(1)
    try:
        generate(folder, inputs, **config)
    except InputError as error:
        folder.with_name(f"{folder.name}.refused").write_text(str(error))
        os._exit(REFUSED)
