"""Run the stages of a job: decide, lock, run, write the manifest last.

A finished stage never runs again; a changed setting reruns the stages that depend on it and no others. All input errors
are raised before anything starts. Ray is started only if a stage must run.
"""

from __future__ import annotations

import json
import logging
import shlex
import time
import traceback
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from pipeline.cluster import connect as cluster
from pipeline.config.context import StageContext
from pipeline.config.input_paths import ModelName, input_contents, named_inputs
from pipeline.config.io.loader import resolved_yaml
from pipeline.config.job import REAL_CELL_STAGES, STAGES, JobBase
from pipeline.config.paths.working_folder import in_ray_package
from pipeline.core.faults import fault_point
from pipeline.core.lock import stage_lock
from pipeline.core.logs import setup_logging
from pipeline.core.manifest import Manifest, newest_manifest, read_manifest, write_manifest
from pipeline.stages.registry import stage_function
from pipeline.tracking.tracker import DriverTracker, Tracking
from pipeline.workflow.changes import changed_files
from pipeline.workflow.folders import output_root
from pipeline.workflow.preflight import check_against_data
from pipeline.workflow.schedule import ResolvedJob, Step, command_for, resolve
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


@dataclass(frozen=True)
class JobResult:
    """A finished job."""

    ran: list[str]  # stages that ran; the others had finished before
    manifests: Mapping[str, Manifest]  # of all stages of the job
    resolved: ResolvedJob

    def lines(self) -> list[str]:
        """Return lines for the terminal: where the outputs are, and which command comes next."""
        lines = [f"output            {self.resolved.folder}"]
        for stage, manifest in self.manifests.items():
            label = {"generate": "generated cells", "evaluate": "report"}.get(stage, stage)
            output = manifest.path("report") if "report" in manifest.facts else manifest.folder
            lines.append(f"{label:<17} {output}")
        lines.append("compare runs      make ui")
        last = list(self.manifests)[-1]
        if last in REAL_CELL_STAGES:
            return [*lines, f"next              scldm cells head {shlex.quote(self.manifests[last].folder)}"]
        if last not in STAGES:
            return lines
        later = STAGES[STAGES.index(last) + 1 :]
        following = next((s for s in later if newest_manifest(self.resolved.folder, s) is None), None)
        if following is not None:
            lines.append(f"next              {command_for(following, self.resolved.source)}")
        elif "report" in self.manifests[last].facts:
            lines.append(f"next              scldm open {shlex.quote(str(self.resolved.folder))}")
        return lines


def run_job(job: JobBase, source_path: str | Path, overrides: Sequence[str] = ()) -> JobResult:
    """Run the stages of a job that have not finished yet.

    Args:
        job: A validated job.
        source_path: The job file, for messages and for the record.
        overrides: The `a.b=c` settings that were applied to it, for the record.

    Raises:
        InputError: The job or its data are not usable.
        StageFailed: A stage failed.
    """
    setup_logging(stage=job.name)
    resolved = resolve(job, source_path)
    resolved.require_inputs()
    run = JobRun(resolved, " ".join([str(source_path), *overrides]))
    if in_ray_package(Path.cwd()):
        log.info("running in Ray's temporary copy of the code; output goes to %s", resolved.folder)
    for step in resolved.steps:
        decision = "will run" if step.done is None else "done before"
        log.info("%s %s %s (%s)", step.stage, step.version, decision, step.reason)
    _record_contents(resolved.steps)
    if resolved.todo:
        run.run()
        return JobResult(run.ran, run.manifests, resolved)
    stages = list(resolved.configs)
    log.info("nothing to do: %s finished", f"all {len(stages)} stages are" if len(stages) > 1 else f"{stages[0]} is")
    return JobResult([], {s.stage: s.done for s in resolved.steps if s.done is not None}, resolved)


class JobRun:
    """A job in progress: its decided stages, the manifests made so far, and the request of generate.

    Args:
        resolved: The job.
        source: The job file and the settings of the command line, for the record.
    """

    def __init__(self, resolved: ResolvedJob, source: str) -> None:
        self.job, self.steps, self.todo, self.source = resolved.job, resolved.steps, resolved.todo, source
        self.manifests: dict[str, Manifest] = {}
        self.ran: list[str] = []
        self.request = resolved.check_known_data()

    def run(self) -> None:
        """Run all stages in order."""
        with Tracking(self.job, output_root(self.job), self.source) as tracking:
            try:
                with cluster.connect(self.job.resources, list(self.todo)):
                    for step in self.steps:
                        self.manifests[step.stage] = step.done or self._run_step(step, tracking)
                        if step.stage == "ingest" and step.done is None:
                            self.request = check_against_data(self.todo, self.manifests["ingest"])
            finally:
                setup_logging(stage=self.job.name)

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
                _require_same_models(step)
                fault_point("stage.before_run")
                facts = stage_function(step.stage)(step.config, context)
                if step.stage == "ingest":
                    _require_unchanged(step)
                manifest = _manifest(step, inputs, context, facts, tracker)
                fault_point("stage.before_manifest")
                write_manifest(manifest)
                fault_point("stage.after_manifest")
                tracker.describe(manifest)
            self.ran.append(step.stage)
            log.info("%s finished in %.0f s", step.version, manifest.seconds)
            return manifest


def _require_unchanged(step: Step) -> None:
    """Raise InputError if an input file changed while the stage ran: its result is that of neither content."""
    for key, now in input_contents(step.config).items():
        if key in step.contents and (files := changed_files(step.contents[key].files, now.files)):
            raise InputError(
                f"{now.setting}: {now.value} changed while {step.stage} ran ({', '.join(files)}); run again when "
                "nothing writes to it"
            )


def _require_same_models(step: Step) -> None:
    """Raise InputError if a model's name stands for another model than when the stage got its version.

    `runs/census` is the newest flow there, and stages before this one may have taken hours.
    """
    for setting, value, mark, owner in named_inputs(step.config):
        if isinstance(mark, ModelName) and mark.key in step.contents:
            now = mark.content(setting, value, owner)
            if now is not None and (files := changed_files(step.contents[mark.key].files, now.files)):
                raise InputError(
                    f"{setting}: {value} stands for another model than when this job began ({', '.join(files)}); run "
                    "the same command again to use that one, or name a version"
                )


def _record_contents(steps: Sequence[Step]) -> None:
    """Add the content of their input to results of version 0.1, so that a later copy or touch changes nothing."""
    for step in steps:
        if step.done is not None and step.contents and not step.done.contents:
            contents = {key: dict(c.files) for key, c in step.contents.items()}
            try:
                write_manifest(replace(step.done, contents=contents))
            except OSError as error:
                log.warning("the content of its input cannot be added to %s (%s)", step.folder, error)


def _manifest(
    step: Step, inputs: Mapping[str, Manifest], context: StageContext, facts: Mapping[str, Any], tracker: DriverTracker
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
        contents={key: dict(c.files) for key, c in step.contents.items()},
    )


@contextmanager
def _reported(step: Step, tracker: DriverTracker) -> Iterator[None]:
    """End the tracking run with the stage's status; turn a failure into a one-line error and a log file."""
    try:
        yield
    except (KeyboardInterrupt, SystemExit):
        tracker.finish("KILLED")
        raise
    except Exception as error:
        cause = cluster.root_cause(error)
        error_log = step.folder / ERROR_LOG
        error_log.write_text("".join(traceback.format_exception(error)))
        tracker.artifact(error_log)
        tracker.finish("FAILED")
        if isinstance(cause, InputError):
            raise InputError(f"{step.stage}: {cause}") from error
        raise StageFailed(step.stage, cause, error_log) from error
    tracker.finish("FINISHED")
