"""Plan a generation: cells, shards, bytes, and the time at the rate of the last one. Starts nothing."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from pipeline.config.apply import ModelNames, PerturbConfig
from pipeline.config.job import DistilConfig, GenerateConfig, ResourcesConfig, TrainFlowConfig, TrainVaeConfig
from pipeline.core.manifest import Manifest
from pipeline.core.text import compact, duration, human
from pipeline.planning import sizes
from scldm.api.folders import find_model
from scldm.flow.config import shown_guidance
from scldm.generation.request import Request

VOCABULARY = "vocabulary.json"  # in a model folder
Strategy = Literal["joint", "mutually_exclusive"]


def generation_lines(
    config: GenerateConfig,
    data: sizes.DataFacts,
    vae: TrainVaeConfig | None,
    resources: ResourcesConfig,
    before: Manifest | None,
    *,
    n_cells: int | None = None,
    strategy: Strategy = "joint",
    distilled: int | None = None,
) -> tuple[list[str], int]:
    """Return lines of the plan, and bytes on disk (0 if they are not known).

    Args:
        distilled: Evaluations of the distilled flow of this pipeline; None if the trained one generates. That of a
            named model is read.
        strategy: How the flow combines labels; that of a named model is read.
        before: The generation of this pipeline that finished last, whose rate gives the time.
        n_cells: Of the resolved request; None if it is not known yet.
    """
    if config.model is not None:
        data = _facts_of(config.model)
    if n_cells is None:
        n_cells = requested_cells(config, data)
    if n_cells is None:
        return [f"generate: cells unknown until ingest has run, {_actors(resources)}"], 0
    shards = max(1, -(-n_cells // config.shard_size))
    size = cell_bytes(config, data, vae)
    amount = f"{n_cells:,} cells in {shards:,} shards of at most {config.shard_size:,}"
    total = None if size is None else round(n_cells * size)
    lines = [f"generate: {amount}, about {human(total)}, {_actors(resources)}"]
    if size is not None:
        lines[0] += f"; {human(size)} a cell before compression, {human(size * config.shard_size)} a shard"
    lines.append(f"generate: {_time(n_cells, config, before)}")
    lines.append(f"generate: {_evaluations(config, strategy, distilled)}")
    return lines, total or 0


def distil_lines(config: DistilConfig, flow: TrainFlowConfig | None, vae: TrainVaeConfig | None) -> list[str]:
    """Return lines on what a distillation solves and makes.

    Args:
        flow: The flow that it distils; None if that is a named model.
        vae: Of that flow.
    """
    from pipeline.planning.cost import EVALUATIONS, STARTING, network_outputs

    solved = config.trajectories + config.train.validation_cells
    strategy = "joint" if flow is None else flow.model.strategy
    each = config.teacher_steps * EVALUATIONS["adams"] + STARTING["adams"]
    each *= network_outputs(config.guidance, strategy)
    size = "" if vae is None else f", {human(trajectory_bytes(config, vae))}"
    return [
        f"distil: {solved:,} trajectories are solved once, {each} evaluations of the flow each{size}",
        f"distil: makes a flow of {_times(config.evaluations)} a cell, guidance {shown_guidance(config.guidance)}",
    ]


def _times(evaluations: int) -> str:
    return "1 evaluation" if evaluations == 1 else f"{evaluations} evaluations"


def trajectory_bytes(config: DistilConfig, vae: TrainVaeConfig) -> int:
    """Return the bytes of all solved trajectories."""
    states = (config.trajectories + config.train.validation_cells) * (config.evaluations + 1)
    return states * vae.model.n_latent_tokens * vae.model.latent_width * 4


def _evaluations(config: GenerateConfig, strategy: Strategy, distilled: int | None) -> str:
    """Return how often the network is evaluated for a cell."""
    from pipeline.planning.cost import generation_evaluations, network_outputs

    if config.model is not None and config.model.flow is not None:
        about = json.loads((find_model(config.model.flow, "flow") / "config.json").read_text())
        strategy, distilled = about["config"]["strategy"], about.get("distilled", {}).get("evaluations")
    if distilled is not None:
        return f"{_times(distilled)} of the network a cell (distilled, whatever the guidance)"
    sampler = config.sampler
    n = network_outputs(sampler.guidance, strategy)
    about = "about " if sampler.solver == "dopri5" else ""  # which chooses its steps
    ways = ", by way of control cells" if config.start == "control" else ""
    outputs = f"{n} outputs a step by guidance" if n > 1 else "one output a step"
    evaluations = generation_evaluations(sampler, strategy, config.start)
    return (
        f"{about}{evaluations} network evaluations a cell ({sampler.solver}, {outputs}{ways}); "
        "rows with guidance of their own take what theirs takes"
    )


def predicted_lines(folder: Path, ingest: Manifest | None, request: Request | None) -> list[str]:
    """Return a line with the verdicts of a finished predict_error on the combinations that are asked for.

    Args:
        folder: Of the pipeline.
        ingest: The ingest that the job uses; None if it has not finished, and nothing is known of its cells.
        request: Of generate; None if it is not known yet.
    """
    if ingest is None or request is None:
        return []
    from pipeline.stages.unseen.finished import finished_predictions, verdict_line

    found = finished_predictions(folder, ingest)
    line = None if found is None else verdict_line(found, [row.condition for row in request.rows])
    return [] if line is None else [f"generate: {line}"]


def perturbed_lines(config: PerturbConfig, inputs: Mapping[str, Manifest], folder: Path) -> list[str]:
    """Return a line with the verdicts of a finished predict_error on combinations with the classes of `to`.

    Args:
        config: Settings of a perturb job; the plan does not read its source, so that all contexts are counted.
        inputs: Manifests of the stages that it reads.
        folder: Of the pipeline.
    """
    from pipeline.inference.models import target_classes
    from pipeline.stages.unseen.beside import predictions_of
    from pipeline.stages.unseen.finished import verdict_line
    from scldm.data.vocabulary import Vocabulary

    found = predictions_of(config, inputs, folder)
    if found is None or set(config.to) != set(found.treatment):
        return []
    own = inputs["ingest"].path("vocabulary") if "ingest" in inputs else inputs["train_flow"].path("model") / VOCABULARY
    to = target_classes(config, Vocabulary.load(own))
    asked = [row for row in found.rows.values() if all(row[label] == to[label] for label in found.treatment)]
    line = verdict_line(found, [{label: row[label] for label in found.labels} for row in asked])
    return [] if line is None else [f"perturb: {line}"]


def _facts_of(model: ModelNames) -> sizes.DataFacts:
    """Return what is known of the data that a named model was trained on."""
    names = json.loads((find_model(model.vae, "vae") / "vocabulary.json").read_text())
    classes = {label: len(c) for label, c in names["labels"].items()}
    return sizes.DataFacts(n_genes=len(names["feature_ids"]), n_classes=classes, source=f"the model {model.vae}")


def requested_cells(config: GenerateConfig, data: sizes.DataFacts) -> int | None:
    """Return the number of cells that a checked config requests; None if the data that tell do not exist yet."""
    if config.conditions is None:
        return sizes.generated_cells(config, data)
    from pipeline.inference.request import read_conditions

    return sum(int(float(n)) for n in read_conditions(Path(config.conditions))["n_cells"])


def cell_bytes(config: GenerateConfig, data: sizes.DataFacts, vae: TrainVaeConfig | None) -> float | None:
    """Return the bytes of one cell, uncompressed: its counts and, if the VAE is known, its latents."""
    if data.n_genes is None:
        return None
    share = 1.0 if config.genes is None or isinstance(config.genes, str) else len(config.genes) / data.n_genes
    latents = 0 if vae is None else vae.model.n_latent_tokens * vae.model.latent_width * 4
    return sizes.expressed_genes(data) * share * sizes.BYTES_PER_COUNT + latents


def _time(n_cells: int, config: GenerateConfig, before: Manifest | None) -> str:
    rate: float = before.facts.get("cells_per_s", 0.0) if before is not None else 0.0
    if before is None or rate <= 0:
        return "time unknown: no generation of this pipeline has finished yet, so its rate has not been measured"
    used: Mapping[str, Any] = before.config.get("sampler", {})
    same = dict(used) == config.sampler.model_dump(mode="json")
    caveat = "with the same sampler" if same else "with another sampler"
    return (
        f"about {duration(n_cells / rate)} at {compact(rate)} cells/s, which is what generate {before.version} made "
        f"({before.facts.get('n_cells', 0):,} cells, {caveat}, start-up included)"
    )


def _actors(resources: ResourcesConfig) -> str:
    low, high = resources.actors_min, resources.actors_max
    return f"{high} actors" if low in (1, high) else f"{low} to {high} actors"
