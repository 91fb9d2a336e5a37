"""Distils a trained flow: solves its trajectories once, then trains a copy to jump along them in a few evaluations."""

from __future__ import annotations

import json
import logging
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from pipeline.config.context import StageContext
from pipeline.config.job import DistilConfig
from pipeline.config.resources import threads_per_worker
from pipeline.core.faults import VARIABLE
from pipeline.core.progress import ProgressReader, ProgressWriter
from pipeline.core.shards import Record, ShardStore
from pipeline.inference.actors.pool import run_on_actors
from pipeline.inference.models import model_on_every_node
from pipeline.stages.training.model_card import distilled_card
from pipeline.stages.training.spec import common_spec
from pipeline.stages.training.trajectories import (
    POINTS,
    TrajectorySolver,
    TrajectorySpec,
    drawn_conditions,
    parts_of,
)
from pipeline.training.tasks.distil import TRAJECTORIES
from pipeline.training.tasks.spec import DistilWorkerSpec
from pipeline.training.trainer import fit
from scldm.api.folders import find_models
from scldm.data.library_size import LibrarySizes
from scldm.data.vocabulary import Vocabulary
from scldm.errors import CheckpointError, InputError

log = logging.getLogger(__name__)
Pool = Callable[[list[int], TrajectorySpec, StageContext], Iterator[Record]]  # solves shards, yields their records
SPLITS = ("train", "validation")
OWN_VAE = "vae"  # folder of the VAE of a flow that the job named, next to the distilled one


def ray_pool(shards: list[int], spec: TrajectorySpec, context: StageContext) -> Iterator[Record]:
    """Solve shards on Ray actors, or on one without Ray."""
    return run_on_actors(TrajectorySolver, shards, spec, context.resources, folder=context.folder)


def run(config: DistilConfig, context: StageContext, pool: Pool = ray_pool) -> dict[str, Any]:
    """Distil and return the facts: those of a training, trajectories, evaluations, guidance, vae if it is not the
    pipeline's."""
    teacher = _teacher(config, context)
    if problems := folder_problems(config, teacher):
        raise InputError("\n".join(problems))
    records = solve(config, context, teacher, pool)
    spec = DistilWorkerSpec(
        config=config, card=distilled_card(config, teacher, context.inputs), **common_spec(context), teacher=teacher,
        trajectories={s: [(r["file"], r["n_cells"]) for r in records if r["split"] == s] for s in SPLITS},
    )  # fmt: skip
    facts = fit(spec, config.train, context.resources, "distil")
    about = {"evaluations": config.evaluations, "guidance": config.guidance, "trajectories": config.trajectories}
    return facts | about | {"latent_shape": _about(teacher)["latent_shape"]} | _vae(config, context)


def solve(config: DistilConfig, context: StageContext, teacher: Path, pool: Pool) -> list[Record]:
    """Return the records of all shards of trajectories; those that an interrupted job committed are kept."""
    folder = context.folder / TRAJECTORIES
    folder.mkdir(exist_ok=True)
    store = ShardStore(folder, POINTS)
    store.remove_abandoned()  # nobody else writes here: the stage is locked
    parts = parts_of(config)
    total = parts[-1].stop
    conditions, rows = drawn_conditions(
        Vocabulary.load(teacher / "vocabulary.json"), LibrarySizes.load(teacher / "library_size.json"), total,
        label_dropout=_about(teacher)["config"]["label_dropout"], seed=context.seed,
    )  # fmt: skip
    spec = TrajectorySpec(
        teacher=teacher, folder=folder, config=config, conditions=conditions, rows=rows, parts=parts, seed=context.seed,
        threads=threads_per_worker(context.resources), fault=os.environ.get(VARIABLE, ""),
    )  # fmt: skip
    records = {r["file"]: r for r in store.committed()}
    todo = [i for i, part in enumerate(parts) if part.name not in records]
    progress, done = ProgressWriter(context.folder), sum(r["n_cells"] for r in records.values())
    log.info("distil: %d trajectories under %d conditions, %d of them solved before", total, len(conditions), done)
    with ProgressReader(context.folder, "distil"):
        for record in pool(todo, spec, context) if todo else ():
            records[record["file"]] = record
            done += record["n_cells"]
            progress.update(done, total)
    return [records[part.name] for part in parts]


def folder_problems(config: DistilConfig, teacher: Path) -> list[str]:
    """Return why the flow in a model folder cannot be distilled as the settings say."""
    from pipeline.inference.models import distilled_of, flow_start
    from scldm.flow.config import PathConfig
    from scldm.flow.distilled import teacher_problems

    about = _about(teacher)
    labels = [x.name for x in Vocabulary.load(teacher / "vocabulary.json").labels]
    return teacher_problems(
        config.guidance, path=PathConfig.model_validate(about["path"]), labels=labels,
        strategy=about["config"]["strategy"], label_dropout=about["config"]["label_dropout"], start=flow_start(teacher),
        distilled=distilled_of(teacher),
    )  # fmt: skip


def _about(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "config.json").read_text())
    return found


def _teacher(config: DistilConfig, context: StageContext) -> Path:
    if config.model is not None:
        return model_on_every_node(config.model, "flow", context.output, weights=config.weights)
    return context.inputs["train_flow"].path("model").resolve()


def _vae(config: DistilConfig, context: StageContext) -> dict[str, Any]:
    """Return where the VAE of the flow is, if it is not that of train_vae; it is copied next to the distilled flow."""
    if config.model is None:
        stage = context.inputs["train_flow"]
        if (own := stage.facts.get("vae")) is None:
            return {}
        source = Path(stage.folder) / own[config.weights]
    else:
        try:
            source = find_models(config.model, weights=config.weights).vae
        except CheckpointError:  # a flow alone: whoever generates with it names its VAE
            return {}
    shutil.copytree(source, context.folder / OWN_VAE, dirs_exist_ok=True)
    return {"vae": {"ema": OWN_VAE, "raw": OWN_VAE}}
