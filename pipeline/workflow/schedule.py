"""Decide what a job does before anything starts: the version and inputs of each stage, and whether it must run.

A version is a hash of settings, seed, the content of input files and the versions of the inputs, so all stages can be
decided without running any. A stage whose manifest of that version exists is done. The others must run, and each of
their inputs must be a stage of the job or an earlier result; otherwise one error names everything that is missing.
"""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from pipeline.config.input_paths import InputContent, input_contents, settings_without_paths
from pipeline.config.job import IN_ORDER, NEEDS, JobBase, needs, stage_configs
from pipeline.core.manifest import Manifest, newest_manifest, read_manifest, stage_version
from pipeline.workflow.changes import changed_since_0_1, check_experiment, reason_to_run, versions_of_0_1
from pipeline.workflow.folders import pipeline_folder
from pipeline.workflow.preflight import check_against_data, check_settings
from scldm.config import StrictModel
from scldm.errors import InputError
from scldm.generation.request import Request

READ_COUNTS = (
    "train_vae",
    "encode",
    "train_flow",
    "evaluate",
    "predict_error",
)  # stages that read the cells of ingest again


@dataclass(frozen=True)
class Step:
    """A stage of a job with its version, its inputs and whether it must run."""

    stage: str
    config: StrictModel
    version: str
    folder: Path
    inputs: Mapping[str, Manifest]  # only version and folder are set for stages that have not run yet
    done: Manifest | None
    reason: str  # why it runs; or, if it is done, how long it took
    contents: Mapping[str, InputContent]  # of the input files that the settings name

    def as_input(self) -> Manifest:
        """Return the manifest that later stages see as their input."""
        return self.done or Manifest.planned(self.stage, self.version, self.folder)


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

    def check_known_data(self) -> Request | None:
        """Check what the job needs of data that were ingested before; data of this job are checked after ingest.

        Returns:
            The request of generate; None if generate does not run, or the data are not known.

        Raises:
            InputError: The data lack something.
        """
        waiting = {stage: c for stage, c in self.configs.items() if stage not in {s.stage for s in self.steps}}
        ingest = next((s.inputs["ingest"] for s in self.steps if s.done is None and "ingest" in s.inputs), None)
        if ingest is None and waiting:
            ingest = self._ingest_of(waiting)
        if ingest is None or not ingest.is_finished:
            return None
        vae = next((s.inputs["train_vae"] for s in self.steps if s.done is None and "train_vae" in s.inputs), None)
        return check_against_data(
            {**self.todo, **waiting}, ingest, vae if vae is not None and vae.is_finished else None
        )

    def _ingest_of(self, waiting: Mapping[str, StrictModel]) -> Manifest | None:
        """Return the ingest that stages would read which cannot be decided yet."""
        own = next((s.as_input() for s in self.steps if s.stage == "ingest"), None)
        read = {name for stage, config in waiting.items() for name in needs(stage, config)}
        earlier = [s for s in IN_ORDER if s in read and s not in self.configs]
        return own or _find_earlier(self.job, self.folder, earlier).get("ingest")

    def require_inputs(self) -> None:
        """Raise InputError if inputs of the job do not exist; all of them are named."""
        if self.missing:
            raise InputError(_missing_message(self.missing, self.folder, self.source))


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
    """Decide the stages of a job in order; a stage whose inputs are missing is left out, and so are those behind it."""
    steps: dict[str, Step] = {}
    needed_by: dict[str, list[str]] = {}  # missing stage -> the stages that need it
    for stage, config in configs.items():
        required = needs(stage, config)
        earlier = _find_earlier(job, folder, [n for n in required if n not in configs])
        if stage == "evaluate" and _brings_its_vae(earlier.get("generate")):
            required = tuple(name for name in required if name != "train_vae")
            earlier.pop("train_vae", None)
        for name, manifest in earlier.items():
            if manifest is None:
                needed_by.setdefault(name, []).append(stage)
        inputs = {name: steps[name].as_input() for name in required if name in steps}
        inputs |= {name: manifest for name, manifest in earlier.items() if manifest is not None}
        if set(inputs) == set(required):
            _check_lineage(stage, inputs, source)
            _check_cells(stage, inputs, job, folder)
            steps[stage] = _decide(job, folder, stage, config, inputs, steps)
            if steps[stage].done is None and stage in READ_COUNTS and "ingest" in earlier:
                check_experiment(inputs["ingest"], command_for("ingest", source))
    _add_inputs_of_missing(job, folder, configs, needed_by)
    order = [*IN_ORDER, *(s for s in needed_by if s not in IN_ORDER)]  # perturb, whose cells evaluate may read
    return list(steps.values()), [Missing(s, tuple(needed_by[s])) for s in order if s in needed_by]


def _brings_its_vae(generated: Manifest | None) -> bool:
    """Return whether cells were generated by models that the job named: the VAE is then theirs, and not train_vae's."""
    return generated is not None and generated.is_finished and "train_vae" not in generated.inputs


def _add_inputs_of_missing(
    job: JobBase, folder: Path, configs: Mapping[str, StrictModel], needed_by: dict[str, list[str]]
) -> None:
    """A missing stage has inputs of its own, which may be missing too."""
    for stage in reversed(IN_ORDER):
        for name in NEEDS[stage] if stage in needed_by else ():
            if name not in configs and name not in job.inputs and newest_manifest(folder, name) is None:
                needed_by.setdefault(name, []).append(stage)


def _decide(
    job: JobBase,
    folder: Path,
    stage: str,
    config: StrictModel,
    inputs: dict[str, Manifest],
    steps: Mapping[str, Step],
) -> Step:
    where = "" if stage == job.kind else f"{stage}."  # a job of one stage has its settings at the top level
    contents = input_contents(config, where=where)
    version = stage_version(stage, settings_without_paths(config, contents), inputs, seed=job.seed)
    stale = ""
    if read_manifest(folder / stage / version) is None:
        older = versions_of_0_1(stage, config, inputs, job.seed, contents)
        for given in (v for v in older if v != version and (folder / stage / v).is_dir()):
            stale = changed_since_0_1(read_manifest(folder / stage / given), contents)
            version = version if stale else given
    own = folder / stage / version
    done = read_manifest(own)
    if done is not None:
        return Step(stage, config, version, own, inputs, done, f"finished in {done.seconds:.0f} s", contents)
    rerun = [s for s in inputs if s in steps and steps[s].done is None]
    reason = stale or reason_to_run(config, inputs, contents, rerun, newest_manifest(folder, stage))
    resumed = "resumes where it stopped: " if own.exists() else ""
    return Step(stage, config, version, own, inputs, None, resumed + reason, contents)


# ---- looking things up -------------------------------------------------------------------------------------------
def _find_earlier(job: JobBase, folder: Path, stages: list[str]) -> dict[str, Manifest | None]:
    """Find the manifests of stages that are not in this job.

    The order is: the one named in `inputs`; the one that a named stage was made from; the newest.
    """
    found: dict[str, Manifest | None] = {}
    for stage in reversed(stages):  # later stages first, so that their own inputs are known
        if stage in job.inputs:
            found[stage] = _named(job.inputs[stage], stage)
            continue
        parents = [m for s, m in found.items() if m is not None and s in job.inputs and stage in m.inputs]
        if parents:
            pipeline = Path(parents[0].folder).parent.parent
            found[stage] = read_manifest(pipeline / stage / parents[0].inputs[stage])
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


def _check_cells(stage: str, inputs: Mapping[str, Manifest], job: JobBase, folder: Path) -> None:
    """Check that a stage reads the cells of its own pipeline, unless the job names others.

    An input of another pipeline brings its own ingest along, and with it other cells than the name of this one says.
    """
    cells = "ingest"
    ingest = inputs.get(cells)
    if ingest is None or stage not in READ_COUNTS or cells in job.inputs:
        return
    if Path(ingest.folder).absolute().parent.parent != folder.absolute():
        named = ", ".join(f"inputs.{name}" for name in job.inputs)
        raise InputError(
            f"{stage}: {named} was made from the cells of another pipeline ({ingest.folder}), and this job would read "
            f"those, not the cells of {job.name}. To use that model on the cells of {job.name}: train_vae with model: "
            f"{next(iter(job.inputs.values()))} and train: false, after an ingest with the model's genes. If you do "
            f"mean those cells, name them: inputs.{cells}={ingest.folder}"
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
            return f"scldm run {shlex.quote(str(path))}"
    return f"scldm run JOB.yaml, a job file of kind: {stage}"
