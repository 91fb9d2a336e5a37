"""Decide what a job does before anything starts: the version and inputs of each stage, and whether it must run.

A version is a hash of settings, seed and the versions of the inputs, so all stages can be decided without running any.
A stage whose manifest of that version exists is done. The others must run, and each of their inputs must be a stage of
the job or an earlier result; otherwise one error names everything that is missing.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from pipeline.config.input_paths import input_identities
from pipeline.config.job import NEEDS, STAGES, JobBase, needs, stage_configs
from pipeline.core.manifest import Manifest, newest_manifest, read_manifest, stage_version
from pipeline.core.nested import changed_settings
from pipeline.workflow.preflight import check_settings
from scldm.config import StrictModel
from scldm.errors import InputError

_RAY_PACKAGE = ("working_dir_files", "_ray_pkg_")


@dataclass(frozen=True)
class Step:
    """A stage of a job with its version, its inputs and whether it must run."""

    stage: str
    config: StrictModel
    version: str
    folder: Path
    inputs: Mapping[str, Manifest]  # only version and folder are set for stages that have not run yet
    done: Manifest | None
    reason: str  # for running, or how long the finished run took


@dataclass(frozen=True)
class Missing:
    """A stage that others need, that is not in the job and has not run before."""

    stage: str
    needed_by: tuple[str, ...]


@dataclass(frozen=True)
class ResolvedJob:
    """A job whose settings were checked and whose stages were decided, made once and handed on."""

    job: JobBase
    source: Path  # the job file
    folder: Path  # of the pipeline
    configs: Mapping[str, StrictModel]  # stage -> settings, in the order of the stages
    steps: tuple[Step, ...]  # the stages that can be decided
    missing: tuple[Missing, ...]  # what must be made first for the others

    @property
    def todo(self) -> dict[str, StrictModel]:
        """Return the settings of the stages that will run."""
        return {s.stage: s.config for s in self.steps if s.done is None}

    def require_inputs(self) -> None:
        """Raise InputError if inputs of the job do not exist; all of them are named."""
        if self.missing:
            raise InputError(_missing_message(self.missing, self.folder, self.source))


def in_ray_package(folder: Path) -> bool:
    """Return whether a folder is Ray's unpacked copy of a working_dir, which Ray deletes after the job."""
    return any(part == _RAY_PACKAGE[0] or part.startswith(_RAY_PACKAGE[1]) for part in folder.parts)


def output_root(job: JobBase, *, cwd: Path | None = None) -> Path:
    """Return the folder that holds all pipelines.

    A relative path starts at the current folder, or at SCLDM_HOME (~/scldm) if that is Ray's temporary copy.
    """
    if "://" in job.output:
        raise InputError(
            f"output: {job.output}: stages are written with rename, which object stores lack; "
            "use a path that every node mounts (EFS, Filestore, Lustre, NFS), for example /shared/runs"
        )
    root = Path(job.output).expanduser()
    cwd = cwd or Path.cwd()
    if not root.is_absolute():
        home = Path(os.environ.get("SCLDM_HOME") or "~/scldm").expanduser()
        root = (home if in_ray_package(cwd) else cwd) / root
    return root


def pipeline_folder(job: JobBase) -> Path:
    """Return <output root>/<name>, where the stages of this pipeline find each other."""
    return output_root(job) / job.name


def resolve(job: JobBase, source: str | Path = "") -> ResolvedJob:
    """Check the settings of a job and decide as many of its stages as possible.

    Args:
        job: A validated job.
        source: Its file, for messages.

    Raises:
        InputError: Settings contradict each other, or named input files do not exist.
    """
    check_settings(job)
    configs = stage_configs(job)
    steps, missing = _decide_all(job, Path(source), pipeline_folder(job), configs)
    return ResolvedJob(job, Path(source), pipeline_folder(job), configs, tuple(steps), tuple(missing))


def _decide_all(
    job: JobBase, source: Path, folder: Path, configs: Mapping[str, StrictModel]
) -> tuple[list[Step], list[Missing]]:
    steps: dict[str, Step] = {}
    lacking: dict[str, list[str]] = {}
    for stage, config in configs.items():
        made = {s: _as_input(step) for s, step in steps.items() if s in needs(stage, config)}
        found = _find_made(job, folder, [n for n in needs(stage, config) if n not in configs])
        for need in (n for n, manifest in found.items() if manifest is None):
            lacking.setdefault(need, []).append(stage)
        inputs = {**made, **{k: m for k, m in found.items() if m is not None}}
        if len(inputs) < len(needs(stage, config)):
            continue
        _check_lineage(stage, inputs, source)
        steps[stage] = _decide(job, folder, stage, config, inputs, steps)
    for need in reversed(STAGES):  # a missing stage has inputs of its own, which may be missing too
        for deeper in NEEDS[need] if need in lacking else ():
            if deeper not in configs and deeper not in job.inputs and newest_manifest(folder, deeper) is None:
                lacking.setdefault(deeper, []).append(need)
    return list(steps.values()), [Missing(s, tuple(lacking[s])) for s in STAGES if s in lacking]


def _decide(
    job: JobBase,
    folder: Path,
    stage: str,
    config: StrictModel,
    inputs: dict[str, Manifest],
    steps: Mapping[str, Step],
) -> Step:
    version = stage_version(stage, config, inputs, seed=job.seed)
    where = "" if stage == job.kind else f"{stage}."  # a job of one stage has its settings at the top level
    if identities := input_identities(config, where=where):
        version = hashlib.sha256(f"{version}{sorted(identities.items())}".encode()).hexdigest()[:12]
    own = folder / stage / version
    done = read_manifest(own)
    if done is None:
        rerun = [s for s in inputs if s in steps and steps[s].done is None]
        reason = _reason(stage, config, inputs, rerun, newest_manifest(folder, stage))
        reason = f"resumes where it stopped: {reason}" if own.exists() else reason
    else:
        reason = f"finished in {done.seconds:.0f} s"
    return Step(stage, config, version, own, inputs, done, reason)


def _as_input(step: Step) -> Manifest:
    if step.done is not None:
        return step.done
    return Manifest(step.stage, step.version, str(step.folder), {}, {}, {}, seconds=0, finished_at=0)


# ---- looking things up -------------------------------------------------------------------------------------------
def _find_made(job: JobBase, folder: Path, needs: list[str]) -> dict[str, Manifest | None]:
    """Find the manifests of stages that are not in this job.

    The order is: the one named in `inputs`; the one that a named stage was made from; the newest.
    """
    found: dict[str, Manifest | None] = {}
    for stage in reversed(needs):  # later stages first, so that their own inputs are known
        if stage in job.inputs:
            found[stage] = _named(job.inputs[stage], stage)
            continue
        parents = [m for s, m in found.items() if m is not None and s in job.inputs and stage in m.inputs]
        if parents:
            line = Path(parents[0].folder).parent.parent
            found[stage] = read_manifest(line / stage / parents[0].inputs[stage])
        else:
            found[stage] = newest_manifest(folder, stage)
    return found


def _named(path: str, stage: str) -> Manifest:
    folder = Path(path).expanduser().absolute()
    manifest = read_manifest(folder)
    if manifest is None:
        raise InputError(
            f"inputs.{stage}: {path} holds no finished {stage} (no manifest.json). "
            "Name a version's folder, for example runs/demo/" + stage + "/1a2b3c4d5e6f"
        )
    if manifest.stage != stage:
        raise InputError(f"inputs.{stage}: {path} holds a {manifest.stage}, expected a {stage}")
    return manifest


def _check_lineage(stage: str, inputs: Mapping[str, Manifest], source: Path) -> None:
    """Check that the inputs of a stage were made from each other: latents of one VAE mean nothing to another."""
    for name, manifest in inputs.items():
        for parent, version in manifest.inputs.items():
            if parent in inputs and inputs[parent].version != version:
                raise InputError(
                    f"{stage}: {name} {manifest.version} was made from {parent} {version}, but this job takes "
                    f"{parent} {inputs[parent].version}. Make {name} again ({command_for(name, source)}), or name the "
                    f"older one: inputs.{parent}={Path(inputs[parent].folder).parent / version}"
                )


def _missing_message(missing: Sequence[Missing], folder: Path, source: Path) -> str:
    """Name all missing stages, where they were looked for, and the commands that make them."""
    lines = [f"{len(missing)} input{'s' if len(missing) > 1 else ''} of this job must be made first:"]
    for m in missing:
        lines.append(f"  {m.stage}: needed by {', '.join(m.needed_by)}; none under {folder / m.stage}")
    lines.append("Run, in this order, with the same `name` and `output`:")
    lines += [f"  {command_for(m.stage, source)}" for m in missing]
    lines.append("or name a finished one: inputs.<stage>=<folder>")
    return "\n".join(lines)


def command_for(stage: str, source: Path) -> str:
    """Return the command that makes a stage: its job file next to the given one, or in jobs/, if there is one."""
    for path in (source.parent / f"{stage}.yaml", Path("jobs") / f"{stage}.yaml"):
        if path.is_file():
            return f"scldm run {path}"
    return f"scldm run JOB.yaml, a job file of kind: {stage}"


# ---- reasons -----------------------------------------------------------------------------------------------------
def _reason(
    stage: str, config: StrictModel, inputs: Mapping[str, Manifest], rerun: list[str], before: Manifest | None
) -> str:
    """Explain why a stage must run, compared with the last time that it finished."""
    if before is None:
        return "first run"
    reasons = list(changed_settings(before.config, config.model_dump(mode="json")))
    shown = [f"setting changed: {', '.join(reasons[:3])}{f' and {len(reasons) - 3} more' if reasons[3:] else ''}"]
    new = [s for s, m in inputs.items() if before.inputs.get(s) != m.version]
    shown = (shown if reasons else []) + ([f"new {', '.join(new)}"] if new else [])
    if not shown:
        shown = [f"{', '.join(rerun)} runs again"] if rerun else ["the seed or an input file changed"]
    return "; ".join(shown)
