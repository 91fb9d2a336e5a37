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
from pipeline.config.context import StageContext
from pipeline.config.io.loader import resolved_yaml
from pipeline.config.job import REAL_CELL_STAGES, STAGES, JobBase, stage_configs
from pipeline.core.faults import fault_point
from pipeline.core.lock import stage_lock
from pipeline.core.logs import setup_logging
from pipeline.core.manifest import Manifest, newest_manifest, read_manifest, write_manifest
from pipeline.stages.registry import stage_function
from pipeline.tracking.tracker import StageTracker, Tracking
from pipeline.workflow.preflight import check_against_data
from pipeline.workflow.schedule import (
    ResolvedJob,
    Step,
    command_for,
    in_ray_package,
    output_root,
    pipeline_folder,
    resolve,
)
from scldm.errors import InputError
from scldm.generation.request import Request

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
    resolved = resolve(job, source_path)
    resolved.require_inputs()
    run = JobRun(resolved, overrides)
    if in_ray_package(Path.cwd()):
        log.info("running in Ray's temporary copy of the code; output goes to %s", resolved.folder)
    for step in resolved.steps:
        decision = "will run" if step.done is None else "done before"
        log.info("%s %s %s (%s)", step.stage, step.version, decision, step.reason)
    if resolved.todo:
        run.run()
    else:
        stages = list(resolved.configs)
        log.info("nothing to do: %s finished", f"all {len(stages)} stages are" if stages[1:] else f"{stages[0]} is")
    return list(resolved.todo)


class JobRun:
    """A job in progress: its decided stages, the manifests made so far, and the request of generate.

    Args:
        resolved: The job.
        overrides: The settings of the command line, for the record.

    Raises:
        InputError: Data that were ingested before lack what the job needs.
    """

    def __init__(self, resolved: ResolvedJob, overrides: Sequence[str]) -> None:
        self.job, self.steps, self.todo = resolved.job, resolved.steps, resolved.todo
        self.source = f"{resolved.source} {' '.join(overrides)}"
        self.manifests: dict[str, Manifest] = {}
        self.request: Request | None = None
        inputs = [s.inputs["ingest"] for s in self.steps if s.done is None and "ingest" in s.inputs]
        if inputs and inputs[0].facts:
            self.request = check_against_data(self.todo, inputs[0])

    def run(self) -> None:
        """Run all stages in order."""
        tracking = Tracking.open(self.job, output_root(self.job), self.source)
        status = "FAILED"
        try:
            with cluster.connect(self.job.resources):
                for step in self.steps:
                    self.manifests[step.stage] = step.done or self._run_step(step, tracking)
                    if step.stage == "ingest":  # the content of the data is known only now
                        self.request = check_against_data(self.todo, self.manifests["ingest"])
            status = "FINISHED"
        except (KeyboardInterrupt, SystemExit):
            status = "KILLED"
            raise
        finally:
            setup_logging(stage=self.job.name)
            tracking.close(status)

    def _run_step(self, step: Step, tracking: Tracking) -> Manifest:
        """Run one stage in its folder, under its lock."""
        setup_logging(stage=step.stage)
        step.folder.mkdir(parents=True, exist_ok=True)
        with stage_lock(step.folder, log.warning):
            # Another job may have finished the stage before we took the lock.
            if (done := read_manifest(step.folder)) is not None:
                log.info("%s was finished in the meantime (%s), nothing to do", step.version, step.folder)
                return done
            log.info("%s runs in %s", step.version, step.folder)
            header = f"# {step.stage} {step.version}: the whole job as it ran, from {self.source}\n"
            (step.folder / "config.yaml").write_text(header + resolved_yaml(self.job))
            inputs = {name: self.manifests.get(name, manifest) for name, manifest in step.inputs.items()}
            config = step.config.model_dump(mode="json")
            tracker = tracking.stage(step.stage, step.version, step.folder, config, inputs)
            context = StageContext(
                folder=step.folder, inputs=inputs, seed=self.job.seed, resources=self.job.resources, tracker=tracker,
                output=output_root(self.job), checkpoints=self.job.checkpoints, request=self.request,
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


# ---- at the end --------------------------------------------------------------------------------------------------
def output_lines(job: JobBase, source: Path) -> list[str]:
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
    return [*lines, f"next              {command_for(following[0], source)}"] if following else lines
