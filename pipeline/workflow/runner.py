"""Run the stages of a job: decide, lock, run, write the manifest last.

A finished stage never runs again; a changed setting reruns the stages that depend on it and no others. All input errors
are raised before anything starts. Ray is started only if a stage must run.
"""

from __future__ import annotations

import json
import logging
import time
import traceback
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from pipeline.cluster import connect as cluster
from pipeline.config.io.loader import resolved_yaml
from pipeline.config.job import REAL_CELL_STAGES, STAGES, JobBase, stage_configs
from pipeline.core.faults import fault_point
from pipeline.core.lock import stage_lock
from pipeline.core.logs import setup_logging
from pipeline.core.manifest import Manifest, StageContext, newest_manifest, read_manifest, write_manifest
from pipeline.stages.registry import stage_function
from pipeline.tracking.tracker import StageTracker, Tracking
from pipeline.workflow.preflight import check_against_data, check_settings
from pipeline.workflow.schedule import (
    Step,
    command_for,
    in_ray_package,
    output_root,
    pipeline_folder,
    schedule,
)
from scldm.errors import InputError

log = logging.getLogger(__name__)

ERROR_LOG = "error.log"


class StageFailed(Exception):
    """A stage failed with an error that is not bad input; its traceback is in `log`."""

    def __init__(self, stage: str, cause: BaseException, log: Path) -> None:
        super().__init__(stage, cause, log)
        self.stage, self.cause, self.log = stage, cause, log

    def __str__(self) -> str:
        cause = str(self.cause).strip()
        first = cause.splitlines()[0] if cause else "no message"
        return f"{self.stage} failed: {type(self.cause).__name__}: {first}"


def run_job(job: JobBase, source_path: str | Path, overrides: Sequence[str] = ()) -> list[str]:
    """Run the stages of a job that have not finished yet. Returns the names of the stages that ran.

    Args:
        job: A validated job.
        source_path: The job file, for messages and for the record.
        overrides: The `a.b=c` settings that were applied to it, for the record.
    """
    setup_logging(stage=job.name)
    check_settings(job)
    steps = schedule(job)
    _check_ahead(steps)
    if in_ray_package(Path.cwd()):
        log.info("running in Ray's temporary copy of the code; output goes to %s", pipeline_folder(job))
    todo = [s for s in steps if s.done is None]
    for step in steps:
        decision = "will run" if step.done is None else "done before"
        log.info("%s %s %s (%s)", step.stage, step.version, decision, step.why)
    if todo:
        _run_steps(job, steps, source_path, overrides)
    else:
        finished = f"all {len(steps)} stages are" if len(steps) > 1 else f"{steps[0].stage} is"
        log.info("nothing to do: %s finished", finished)
    return [s.stage for s in todo]


def _run_steps(job: JobBase, steps: list[Step], source_path: str | Path, overrides: Sequence[str]) -> None:
    tracking = Tracking.open(job, output_root(job), source_path)
    status = "FAILED"
    try:
        with cluster.connect(job.resources):
            made: dict[str, Manifest] = {}
            for step in steps:
                inputs = {name: made.get(name, manifest) for name, manifest in step.inputs.items()}
                if step.done is not None:
                    log.info("%s %s done before (%s), nothing to do", step.stage, step.version, step.folder)
                    made[step.stage] = step.done
                else:
                    header = _header(step, source_path, overrides)
                    made[step.stage] = _run_step(job, step, inputs, tracking, header)
                if step.stage == "ingest":  # the content of the data is known only now
                    check_against_data({s.stage: s.config for s in steps if s.done is None}, made["ingest"])
        status = "FINISHED"
    except (KeyboardInterrupt, SystemExit):
        status = "KILLED"
        raise
    finally:
        setup_logging(stage=job.name)
        tracking.close(status)


def _check_ahead(steps: list[Step]) -> None:
    """Check requests against data that was ingested before."""
    todo = {s.stage: s.config for s in steps if s.done is None}
    known = [s.inputs["ingest"] for s in steps if s.done is None and "ingest" in s.inputs]
    if known and known[0].facts:
        check_against_data(todo, known[0])


def _run_step(job: JobBase, step: Step, inputs: Mapping[str, Manifest], tracking: Tracking, header: str) -> Manifest:
    """Run one stage in its folder, under its lock."""
    setup_logging(stage=step.stage)
    step.folder.mkdir(parents=True, exist_ok=True)
    with stage_lock(step.folder, log.warning):
        # Another job may have finished the stage before we took the lock.
        if (done := read_manifest(step.folder)) is not None:
            log.info("%s was finished in the meantime (%s), nothing to do", step.version, step.folder)
            return done
        log.info("%s runs in %s", step.version, step.folder)
        (step.folder / "config.yaml").write_text(header + resolved_yaml(job))
        config = step.config.model_dump(mode="json")
        tracker = tracking.stage(step.stage, step.version, step.folder, config, inputs)
        context = StageContext(
            folder=step.folder, inputs=inputs, seed=job.seed, resources=job.resources, tracker=tracker,
            output=output_root(job), checkpoints=job.checkpoints,
        )  # fmt: skip
        with _reported(step, tracker):
            fault_point("stage.before_run")
            facts = stage_function(step.stage)(step.config, context)
            manifest = _manifest(step, inputs, context, facts, tracker)
            fault_point("stage.before_manifest")
            write_manifest(manifest)
            fault_point("stage.after_manifest")
            tracker.describe(manifest)
        log.info("%s finished in %.0f s", step.version, manifest.seconds)
        return manifest


def _manifest(
    step: Step, inputs: Mapping[str, Manifest], context: StageContext, facts: Mapping[str, Any], tracker: StageTracker
) -> Manifest:
    try:
        json.dumps(facts)
    except TypeError as error:
        raise TypeError(f"facts of {step.stage} must be plain data for JSON: {error}") from error
    now = time.time()
    return Manifest(
        stage=step.stage,
        version=step.version,
        folder=str(step.folder),
        config=step.config.model_dump(mode="json"),
        inputs={name: m.version for name, m in inputs.items()},
        facts=facts,
        seconds=round(now - context.started, 3),
        finished_at=now,
        tracking=tracker.ids(),
    )


@contextmanager
def _reported(step: Step, tracker: StageTracker) -> Iterator[None]:
    """End the tracking run with the stage's status; turn a failure into a one-line error and a log file."""
    try:
        yield
    except (KeyboardInterrupt, SystemExit):
        tracker.finish("KILLED")
        raise
    except Exception as error:
        cause = cluster.root_cause(error)
        log = step.folder / ERROR_LOG
        log.write_text("".join(traceback.format_exception(error)))
        tracker.artifact(log)
        tracker.finish("FAILED")
        if isinstance(cause, InputError):
            raise InputError(f"{step.stage}: {cause}") from error
        raise StageFailed(step.stage, cause, log) from error
    tracker.finish("FINISHED")


def _header(step: Step, source_path: str | Path, overrides: Sequence[str]) -> str:
    return f"# {step.stage} {step.version}: the whole job as it ran, from {source_path} {' '.join(overrides)}\n"


# ---- at the end --------------------------------------------------------------------------------------------------
def output_lines(job: JobBase) -> list[str]:
    """Return lines that say where the outputs of a finished job are and which command comes next."""
    folder = pipeline_folder(job)
    stages = list(stage_configs(job))
    made = {s: m for s in (*STAGES, *REAL_CELL_STAGES) if (m := newest_manifest(folder, s)) is not None}
    lines = [f"output            {folder}"]
    for stage in (s for s in stages if s in made):
        m = made[stage]
        label = {"generate": "generated cells", "evaluate": "report"}.get(stage, stage)
        lines.append(f"{label:<17} {m.path('report') if 'report' in m.facts else m.folder}")
    lines.append("compare runs      make ui")
    if stages[-1] in REAL_CELL_STAGES:
        return [*lines, f"next              scldm cells head {made[stages[-1]].folder}"]
    following = [s for s in STAGES[STAGES.index(stages[-1]) + 1 :] if s not in made]
    return [*lines, f"next              {command_for(following[0])}"] if following else lines
