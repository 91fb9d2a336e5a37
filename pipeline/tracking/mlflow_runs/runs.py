"""Find or make the runs of a pipeline: a parent, and a child for each version of a stage.

What is needed to make them is plain data that lies in the stage's folder from the start, so that `scldm mlflow sync`
can make the run of a stage whose server never answered.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from pipeline.core.files import write_json_atomic
from pipeline.tracking.mlflow_runs.client import explain, mlflow_client
from pipeline.tracking.provenance import IDS, Inputs, lineage, note, read_ids
from pipeline.tracking.spool_file import Record, waiting

OPENING = ".mlflow_run.json"
PARENT_SPOOL = "mlflow_parent.jsonl"
EXPERIMENT_TAGS = {"mlflow.experimentKind": "custom_model_development"}  # MLflow's pages open with runs, not with chats


@dataclass(frozen=True)
class Pipeline:
    """Where a pipeline's runs are."""

    uri: str
    local: bool  # uri is a SQLite file of ours, with its artifacts beside it
    root: str
    experiment: str
    name: str
    key: str  # of this pipeline in this folder
    began: int  # ms
    tags: Mapping[str, str] = field(default_factory=dict)  # of every run


@dataclass(frozen=True)
class Opening:
    """What the run of a stage is made of."""

    pipeline: Pipeline
    tags: Mapping[str, str]
    inputs: Inputs
    began: int  # ms

    def write(self, folder: Path) -> None:
        write_json_atomic(folder / OPENING, asdict(self))

    @classmethod
    def read(cls, folder: Path) -> Opening | None:
        """None where the folder has none, or a damaged one."""
        try:
            raw = json.loads((folder / OPENING).read_text())
            return cls(Pipeline(**raw["pipeline"]), raw["tags"], raw["inputs"], raw["began"])
        except (OSError, ValueError, TypeError, KeyError):
            return None


class PipelineRuns:
    """The parent run, once it is needed. Every method speaks to the server.

    Args:
        runs_now: The pipeline is running: its runs are RUNNING again, and this is another attempt. False only completes
            what was tracked before.
    """

    def __init__(self, pipeline: Pipeline, *, runs_now: bool = True) -> None:
        self.pipeline, self.runs_now = pipeline, runs_now
        self.parent_id = ""
        self._client: Any = None
        self._experiment_id = ""

    def open_stage(self, folder: Path, opening: Opening) -> tuple[Any, str]:
        """The client, and the run that the stage's folder names, or that was made for it, or a new one."""
        client = self.open_parent()
        ids = read_ids(folder)
        known = ids.get("uri") == self.pipeline.uri
        run_id = ids.get("run_id") if known else None
        if run_id is None:  # a request to make it may have been heard though it was not answered
            version = opening.tags["scldm.version"]
            run_id = self._find(**{"scldm.stage": opening.tags["scldm.stage"], "scldm.version": version})
        if run_id is None:
            run_id = self._create(opening)
        elif self.runs_now:
            client.update_run(run_id, status="RUNNING")
        n = max(1, int(ids.get("attempt", 0)) + int(self.runs_now)) if known else 1
        client.set_tag(run_id, "scldm.attempt", str(n))
        found = {"run_id": run_id, "parent_run_id": self.parent_id, "experiment_id": self._experiment_id}
        write_json_atomic(folder / IDS, {**found, "uri": self.pipeline.uri, "attempt": n})
        return client, run_id

    def _create(self, opening: Opening) -> str:
        tags = {**self.pipeline.tags, **opening.tags, **lineage(opening.inputs), "mlflow.parentRunId": self.parent_id}
        tags["mlflow.note.content"] = note(tags, opening.inputs, experiment_id=self._experiment_id)
        made = self._client.create_run(self._experiment_id, start_time=opening.began, tags=tags)
        return str(made.info.run_id)

    def open_parent(self) -> Any:
        """The client; experiment and parent run exist afterwards."""
        if self._client is not None:
            return self._client
        with self._alone():  # two processes that create one SQLite file at once break it
            client = self._client = mlflow_client(self.pipeline.uri)
            try:
                place = Path(self.pipeline.root) / "mlartifacts" if self.pipeline.local else None
                self._experiment_id = experiment_id(client, self.pipeline.experiment, place)
                self.parent_id = self._find(**{"scldm.stage": "pipeline"}) or self._create_parent()
                if self.runs_now:
                    client.update_run(self.parent_id, status="RUNNING")
            except Exception:
                self._client = None
                raise
        return client

    def _create_parent(self) -> str:
        tags = {**self.pipeline.tags, "mlflow.runName": self.pipeline.name, "scldm.stage": "pipeline"}
        made = self._client.create_run(self._experiment_id, start_time=self.pipeline.began, tags=tags)
        return str(made.info.run_id)

    def _find(self, **tags: str) -> str | None:
        wanted = {"scldm.pipeline": self.pipeline.key, **tags}
        query = " and ".join(f"tags.`{k}` = '{v}'" for k, v in wanted.items())
        runs = self._client.search_runs([self._experiment_id], query, max_results=1)
        return str(runs[0].info.run_id) if runs else None

    @contextmanager
    def _alone(self) -> Iterator[None]:
        if not self.pipeline.local:
            yield
            return
        root = Path(self.pipeline.root)
        root.mkdir(parents=True, exist_ok=True)
        with (root / ".mlflow.lock").open("w") as f:
            with contextlib.suppress(OSError):  # a file system without locks: no worse than without this
                fcntl.flock(f, fcntl.LOCK_EX)
            yield


def experiment_id(client: Any, name: str, artifacts: Path | None) -> str:
    """The experiment of that name, made if need be, with its files in `artifacts` or where the server keeps them."""
    found = client.get_experiment_by_name(name)
    if found:
        return str(found.experiment_id)
    place = None if artifacts is None else artifacts.as_uri()
    return str(client.create_experiment(name, artifact_location=place, tags=EXPERIMENT_TAGS))


class ParentTarget:
    """The parent run as a target of the writer."""

    def __init__(self, runs: PipelineRuns, folder: Path) -> None:
        self.name = "the pipeline"
        self.runs, self.spool = runs, folder / PARENT_SPOOL

    def spools(self) -> list[Path]:
        return waiting(self.spool.parent, self.spool.name)

    def send(self, records: list[Record]) -> list[Record]:
        try:
            client = self.runs.open_parent()
            client.set_terminated(self.runs.parent_id, records[-1]["value"], end_time=records[-1]["at"])
        except Exception as error:
            raise ConnectionError(explain(error, self.runs.pipeline.uri)) from error
        return []
