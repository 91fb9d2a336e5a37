"""Plan a job (`scldm plan`): which stages would run and why, and their size.

Reads manifests and headers of files; starts nothing.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.config.job import (
    DistilConfig,
    JobBase,
    PredictErrorConfig,
    TrainConfig,
    TrainFlowConfig,
    TrainVaeConfig,
)
from pipeline.core.manifest import Manifest, newest_manifest
from pipeline.core.text import human, table
from pipeline.planning import sizes
from pipeline.planning.generation import (
    Strategy,
    distil_lines,
    generation_lines,
    perturbed_lines,
    predicted_lines,
    trajectory_bytes,
)
from pipeline.planning.memory import stage_lines, state_bytes
from pipeline.workflow.schedule import ResolvedJob, Step, command_for
from scldm.generation.request import Request

UNKNOWN = "unknown"


@dataclass(frozen=True)
class Decision:
    """A stage of a job: its version, whether it runs, and the reason."""

    stage: str
    version: str  # empty if it depends on an earlier stage that has not run
    state: str  # "done", "will run", or "needs <stage>, …"
    reason: str


def plan(resolved: ResolvedJob) -> str:
    """Return a table of a job's stages, then the size of each."""
    found, size_lines = _decisions(resolved)
    rows = [("stage", "version", "state", "why"), *((d.stage, d.version, d.state, d.reason) for d in found)]
    todo = [d for d in found if d.state == "will run"]
    waiting = any(d.state.startswith("needs") for d in found)
    lines = [f"{resolved.job.name}: writes to {resolved.folder}", "", table(rows), "", *size_lines]
    lines += ["", f"{len(todo)} of {len(found)} stages will run" if todo or waiting else "nothing to do"]
    return "\n".join(lines)


def plan_data(resolved: ResolvedJob) -> dict[str, Any]:
    """Return the plan for a script: name, folder, stages (stage, version, state, why), and the lines on sizes."""
    found, size_lines = _decisions(resolved)
    return {
        "name": resolved.job.name,
        "folder": str(resolved.folder),
        "stages": [{"stage": d.stage, "version": d.version, "state": d.state, "why": d.reason} for d in found],
        "sizes": [line.strip() for line in size_lines if line.strip()],
    }


def _decisions(resolved: ResolvedJob) -> tuple[list[Decision], list[str]]:
    request = resolved.check_known_data()  # so that a plan refuses what a run refuses
    decided = {s.stage: s for s in resolved.steps}
    lacking = [m.stage for m in resolved.missing]
    found = []
    for stage in resolved.configs:
        step = decided.get(stage)
        if step is None:
            needs, first = ", ".join(lacking), "; ".join(command_for(s, resolved.source) for s in lacking)
            found.append(Decision(stage, "", f"needs {needs}", f"first: {first}"))
        else:
            found.append(Decision(stage, step.version, "done" if step.done else "will run", step.reason))
    return found, _sizes(resolved, decided, request)


# ---- sizes -------------------------------------------------------------------------------------------------------
def _sizes(resolved: ResolvedJob, decided: dict[str, Step], request: Request | None) -> list[str]:
    """Return one or more lines for each stage of the job that takes steps, memory or disk.

    Args:
        request: Of generate; None if it is not known yet.
    """
    job, folder, configs = resolved.job, resolved.folder, dict[str, Any](resolved.configs)
    data = sizes.data_facts(_manifest("ingest", decided, folder), configs.get("ingest"))
    vae = _config("train_vae", TrainVaeConfig, configs, decided, folder)
    n_cells = sum(data.n_cells.values()) if data.n_cells is not None else None
    cells, genes = (f"{n:,}" if n is not None else UNKNOWN for n in (n_cells, data.n_genes))
    named = getattr(configs.get("generate"), "model", None) is not None  # no data are read
    lines = [] if named else [f"data: {cells} cells x {genes} genes ({data.source})"]
    lines += [] if named else _value_lines(data, configs.get("ingest"))
    disk = 0
    if "train_vae" in configs and configs["train_vae"].pretrained is not None:
        lines.append(f"train_vae: {configs['train_vae'].pretrained} is used as it is; nothing is trained")
    elif "train_vae" in configs:
        n = sizes.vae_parameters(configs["train_vae"], data)
        active = sizes.vae_step_bytes(configs["train_vae"], data, job.resources.workers.max)
        lines += _training("train_vae", n, configs["train_vae"].train, job, active)
        disk += sizes.checkpoint_bytes(n or 0, configs["train_vae"].train)
    if "encode" in configs and vae is not None:
        size = sizes.latent_bytes(configs["encode"], vae, data)
        about = f"{human(size)} ({configs['encode'].latents})"
        lines.append(f"encode: latent cache {about}, {job.resources.actors_max} actors")
        disk += size or 0
    if "train_flow" in configs:
        flow: TrainFlowConfig = configs["train_flow"]
        n = sizes.dit_parameters(flow, vae, data) if vae is not None else None
        active = sizes.dit_step_bytes(flow, vae, job.resources.workers.max) if vae is not None else None
        if flow.vae.train and vae is not None and n is not None and active is not None:  # the VAE is trained with it
            n += sizes.vae_parameters(vae, data) or 0
            active += sizes.vae_step_bytes(sizes.joint_vae(flow, vae), data, job.resources.workers.max) or 0
        lines += _training("train_flow", n, flow.train, job, active)
        lines += _controls(flow, vae, data)
        disk += sizes.checkpoint_bytes(n or 0, flow.train)
    if (distil := configs.get("distil")) is not None:
        trained = _config("train_flow", TrainFlowConfig, configs, decided, folder)
        own = distil.model is None and trained is not None and vae is not None
        n = sizes.dit_parameters(trained, vae, data) if own else None
        lines += distil_lines(distil, trained if own else None, vae if own else None)
        lines += _training("distil", n, distil.train, job, None)
        disk += sizes.checkpoint_bytes(n or 0, distil.train)
        disk += trajectory_bytes(distil, vae) if own else 0
    if "generate" in configs:
        before = newest_manifest(folder, "generate")
        n = None if request is None else request.n_cells
        trained = _config("train_flow", TrainFlowConfig, configs, decided, folder)
        strategy: Strategy = "joint" if trained is None else trained.model.strategy
        text, size = generation_lines(
            configs["generate"], data, vae, job.resources, before, n_cells=n, strategy=strategy,
            distilled=_distilled(configs, decided, folder),
        )  # fmt: skip
        lines += text
        if configs["generate"].model is None and configs["generate"].start == "noise":  # as what was predicted
            lines += predicted_lines(folder, _manifest("ingest", decided, folder), request)
        disk += size
    if "perturb" in configs and "perturb" in decided:
        lines += perturbed_lines(configs["perturb"], decided["perturb"].inputs, folder)
    if "predict_error" in configs:
        lines += _predict_error(configs["predict_error"], _manifest("ingest", decided, folder))
    lines += _gpu_hours(job, configs, vae, data, decided, folder)
    return [*lines, f"disk: {human(disk)} in all"] if disk else lines


def _distilled(configs: dict[str, Any], decided: dict[str, Step], folder: Path) -> int | None:
    """Return the evaluations of the distilled flow of this pipeline; None if the trained one generates."""
    if configs["generate"].flow != "distil":
        return None
    distil = _config("distil", DistilConfig, configs, decided, folder)
    return None if distil is None else distil.evaluations


def _predict_error(config: PredictErrorConfig, ingest: Manifest | None) -> list[str]:
    """Return lines on what a job of predicted errors judges, and on its steps."""
    steps = f"{config.seeds} x ({config.base_steps:,} + at most {config.folds + 1} x {config.steps:,})"
    whose = f"start: {config.start or 'noise'}" if config.judged == "flow" else "perturb"
    lines = [f"predict_error: {steps} steps of {config.batch_size} cells, in one process"]
    about = f"cells of method: {config.judged} ({whose}) are judged"
    if ingest is not None and ingest.is_finished:
        from pipeline.stages.unseen.asked import check_predictable

        left_out, asked = check_predictable(config, ingest)
        about += f"; {len(left_out)} measured combinations are left out, {len(asked)} are predicted"
    return [*lines, f"predict_error: {about}"]


def _value_lines(data: sizes.DataFacts, ingest: Any) -> list[str]:
    """Return a line for each label whose classes are values: what was measured, or what the job says before ingest."""
    if data.values:
        return [f"label {label}: {about['summary']}" for label, about in data.values.items()]
    lines = []
    for label, given in getattr(ingest, "label_values", {}).items():
        settings = given.model_dump(exclude={"type"}, exclude_defaults=True)
        said = ", ".join(f"{k} {', '.join(v) if isinstance(v, list) else v}" for k, v in settings.items())
        lines.append(f"label {label}: {given.type}" + (f" ({said})" if said else ""))
    return lines


def _controls(flow: TrainFlowConfig, vae: TrainVaeConfig | None, data: sizes.DataFacts) -> list[str]:
    """Return a line on the control cells that a flow starts at."""
    if flow.start is None:
        return []
    [(label, control)] = flow.start.control.items()
    most = sizes.control_bytes(flow.start, vae, data)
    held = "size unknown until ingest has run" if most is None else f"at most {human(most)} of latents in every worker"
    return [
        f"train_flow: {flow.start.share:.0%} of the cells start at control cells ({label} {control}); at most "
        f"{flow.start.cells_per_group:,} of each combination of the other labels, {held}"
    ]


def _gpu_hours(
    job: JobBase, configs: dict[str, Any], vae: Any, data: sizes.DataFacts, decided: dict[str, Step], folder: Path
) -> list[str]:
    """Return a line for each stage that runs on GPUs; none if the job has no GPU."""
    if not job.resources.gpus_per_worker:
        return []
    from pipeline.planning.cost import stage_estimate, training_step

    flow = _config("train_flow", TrainFlowConfig, configs, decided, folder) if "generate" in configs else None
    lines = []
    for stage, config in configs.items():
        if (step := training_step(stage, config, vae, data, job.resources)) is not None:
            lines.append(f"{stage}: {step}")
        if (found := stage_estimate(stage, config, vae, data, job.resources, flow)) is not None:
            lines.append(f"{stage}: {found}")
    return lines


def _training(stage: str, n: int | None, train: TrainConfig, job: JobBase, activations: float | None) -> list[str]:
    """Return lines on steps, parameters, memory and checkpoints of a training stage."""
    workers = job.resources.world_sizes[0]  # the fewest: then each holds the most
    per_worker = max(1, train.feed.batch_size // workers)
    rounds = math.ceil(per_worker / train.feed.micro_batch_size)
    steps = f"{train.max_steps:,} steps x {train.feed.batch_size} cells"
    feed = f"{workers} workers x {min(per_worker, train.feed.micro_batch_size)} cells x {rounds}"
    if n is None:
        return [f"{stage}: {steps} ({feed}); parameters unknown until ingest has run"]
    state = state_bytes(n, train, workers)
    memory = human(state.weights + state.gradients + state.optimizer)
    kept = human(sizes.checkpoint_bytes(n, train))
    line = (
        f"{stage}: {steps} ({feed}); {n:,} parameters; weights + gradients + optimizer {memory} per worker "
        f"(ZeRO {train.zero_stage}, {train.precision}); {train.keep_last} checkpoints and the model {kept}"
    )
    return [line] if activations is None else [line, *stage_lines(n, train, workers, activations)]


def _manifest(stage: str, decided: dict[str, Step], folder: Path) -> Manifest | None:
    """Return the manifest of a stage that this job would use."""
    if stage in decided:
        return decided[stage].done
    given = next((s.inputs[stage] for s in decided.values() if stage in s.inputs), None)
    return given if given is not None else newest_manifest(folder, stage)


def _config(stage: str, model: type[Any], configs: dict[str, Any], decided: dict[str, Step], folder: Path) -> Any:
    """Return the settings of a stage: this job's, or those of its manifest."""
    if stage in configs:
        return configs[stage]
    manifest = _manifest(stage, decided, folder)
    return model.model_validate(dict(manifest.config)) if manifest is not None and manifest.config else None
