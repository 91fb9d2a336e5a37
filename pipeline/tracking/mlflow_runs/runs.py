"""Find or create the runs of a pipeline: a parent run, and a child run for each version of a stage.

What is needed to create them is written to the stage's folder before the server is contacted, so that
`scldm mlflow sync` can create the run of a stage whose server never answered.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import logging
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from pipeline.core.files import write_json_atomic
from pipeline.tracking.mlflow_runs.client import explain, mlflow_client, restore_command, status_of
from pipeline.tracking.mlflow_runs.moved import follow_move
from pipeline.tracking.provenance import IDS, Inputs, note, read_ids
from pipeline.tracking.record_log import DRIVER_LOG, PARENT_SPOOL, Record, RecordLog, last_status, read_logs
from pipeline.tracking.tags import lineage_tags, parent_tags
from scldm.errors import InputError

log = logging.getLogger(__name__)

OPENING = ".mlflow_run.json"
EXPERIMENT_TAGS = {"mlflow.experimentKind": "custom_model_development"}  # the UI opens with runs, not chats


@dataclass(frozen=True)
class Pipeline:
    """The place of a pipeline's runs in MLflow."""

    uri: str
    local: bool  # uri is a SQLite file of ours, with its artifacts in the same folder
    root: str
    experiment: str
    name: str
    key: str  # identifies this pipeline in this folder
    began: int  # ms
    tags: Mapping[str, str] = field(default_factory=dict)  # set on every run


@dataclass(frozen=True)
class Opening:
    """All that is needed to create the run of a stage."""

    pipeline: Pipeline
    tags: Mapping[str, str]
    inputs: Inputs
    began: int  # ms

    def write(self, folder: Path) -> None:
        """Write it to the stage's folder, by rename."""
        write_json_atomic(folder / OPENING, asdict(self))

    @classmethod
    def read(cls, folder: Path) -> Opening | None:
        """Read it from a stage's folder; None if there is none or it is damaged.

        A database in the output folder is the one that is there now: the folder may have been moved.
        """
        try:
            raw = json.loads((folder / OPENING).read_text())
            pipeline = Pipeline(**raw["pipeline"])
            if pipeline.local:
                root = folder.absolute().parents[2]
                pipeline = replace(pipeline, root=str(root), uri=f"sqlite:///{root / 'mlflow.db'}")
            return cls(pipeline, raw["tags"], raw["inputs"], raw["began"])
        except (OSError, ValueError, TypeError, KeyError):
            return None


class PipelineRuns:
    """The runs of one pipeline, opened when first needed. Every method contacts the server.

    Args:
        running: The pipeline is running: its runs become RUNNING again, and this is another attempt. False only
            completes what was tracked before.
    """

    def __init__(self, pipeline: Pipeline, *, running: bool = True) -> None:
        self.pipeline, self.running = pipeline, running
        self.parent_id = ""
        self._client: Any = None
        self._experiment_id = ""

    def open_stage(self, folder: Path, opening: Opening) -> tuple[Any, str]:
        """Return the client and the id of the stage's run, which is created if there is none.

        The id is that of tracking.json in the stage's folder, else that of a run with the stage's tags.
        """
        client = self.open_parent()
        ids = read_ids(folder)
        known = self._is_ours(ids)
        run_id = ids.get("run_id") if known else None
        if run_id is None:  # an earlier request may have created it although its answer was lost
            version = opening.tags["scldm.version"]
            run_id = self._find(**{"scldm.stage": opening.tags["scldm.stage"], "scldm.version": version})
        if run_id is None:
            run_id = self._create(opening)
        elif self.running:
            client.update_run(run_id, status="RUNNING")
        attempt = max(1, int(ids.get("attempt", 0)) + int(self.running)) if known else 1
        if self.running or not known:
            client.set_tag(run_id, "scldm.attempt", str(attempt))
            found = {"run_id": run_id, "parent_run_id": self.parent_id, "experiment_id": self._experiment_id}
            place = {"uri": self.pipeline.uri, "pipeline": self.pipeline.key}
            write_json_atomic(folder / IDS, {**found, **place, "attempt": attempt})
        return client, run_id

    def _is_ours(self, ids: Mapping[str, Any]) -> bool:
        """Return whether the run that a stage's folder names is one of this pipeline in this store."""
        if ids.get("pipeline", self.pipeline.key) != self.pipeline.key:
            return False  # the folder is a copy, and the run is the original's
        if ids.get("uri") == self.pipeline.uri:
            return True
        moved = self.pipeline.local and str(ids.get("uri", "")).startswith("sqlite:///")
        return moved and self._has(str(ids.get("run_id")))

    def _has(self, run_id: str) -> bool:
        try:
            self._client.get_run(run_id)
        except Exception as error:
            if status_of(error) == 404:
                return False
            raise
        return True

    def _create(self, opening: Opening) -> str:
        lineage = lineage_tags(opening.inputs)
        tags = {**self.pipeline.tags, **opening.tags, **lineage, "mlflow.parentRunId": self.parent_id}
        tags["mlflow.note.content"] = note(tags, opening.inputs, experiment_id=self._experiment_id)
        run = self._client.create_run(self._experiment_id, start_time=opening.began, tags=tags)
        return str(run.info.run_id)

    def open_parent(self) -> Any:
        """Return the client, after experiment and parent run were found or created."""
        if self._client is not None:
            return self._client
        with self._local_lock():  # two processes that create one SQLite file at the same time break it
            if self.pipeline.local and (former := follow_move(Path(self.pipeline.uri.removeprefix("sqlite:///")))):
                log.info("MLflow's artifacts are now those of %s, which was copied or moved from %s",
                         self.pipeline.root, former)  # fmt: skip
            client = self._client = mlflow_client(self.pipeline.uri)
            try:
                place = Path(self.pipeline.root) / "mlartifacts" if self.pipeline.local else None
                self._experiment_id = experiment_id(client, self.pipeline.experiment, place)
                self.parent_id = self._find(**{"scldm.stage": "pipeline"}) or self._create_parent()
                if self.running:
                    client.update_run(self.parent_id, status="RUNNING")
            except Exception:
                self._client = None
                raise
        return client

    def _create_parent(self) -> str:
        tags = {**self.pipeline.tags, **parent_tags(self.pipeline.name)}
        run = self._client.create_run(self._experiment_id, start_time=self.pipeline.began, tags=tags)
        return str(run.info.run_id)

    def _find(self, **tags: str) -> str | None:
        wanted = {"scldm.pipeline": self.pipeline.key, **tags}
        query = " and ".join(f"tags.`{k}` = '{v}'" for k, v in wanted.items())
        runs = self._client.search_runs([self._experiment_id], query, max_results=1)
        return str(runs[0].info.run_id) if runs else None

    @contextmanager
    def _local_lock(self) -> Iterator[None]:
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
    """Return the id of an experiment, which is created if there is none.

    Args:
        artifacts: Where a new experiment keeps its files; None leaves that to the server.
    """
    found = client.get_experiment_by_name(name)
    if found and found.lifecycle_stage == "deleted":
        raise InputError(
            f"MLflow experiment {name!r} was deleted, so that its runs take nothing: "
            f"`{restore_command(client.tracking_uri, found.experiment_id)}` brings it back"
        )
    if found:
        return str(found.experiment_id)
    location = None if artifacts is None else artifacts.as_uri()
    return str(client.create_experiment(name, artifact_location=location, tags=EXPERIMENT_TAGS))


class ParentRun:
    """The status of the pipeline's own run, as a target of the sender; kept in the pipeline's folder."""

    def __init__(self, runs: PipelineRuns, folder: Path) -> None:
        self.name = "the pipeline"
        self.runs, self.folder = runs, folder
        self._log = RecordLog(folder / DRIVER_LOG)

    def record(self, record: Record) -> None:
        """Write a status record to disk."""
        if self.folder.is_dir():  # else no stage has run
            self._log.append(record)

    def complete(self, records: Iterable[Record] = ()) -> bool:
        """Set the newest status, of these records or those on disk. Returns False if there was nothing to do."""
        status = last_status([*read_logs(self.folder, DRIVER_LOG, PARENT_SPOOL), *records])
        client = self.runs.open_parent()
        parent_id = self.runs.parent_id
        if status is None or status["value"] in ("RUNNING", client.get_run(parent_id).info.status):
            return False
        client.set_terminated(parent_id, status["value"], end_time=status["at"])
        return True

    def deliver(self, records: list[Record], *, replay: bool) -> None:
        """Set the newest status; called by the sender's thread."""
        try:
            self.complete(records)
        except Exception as error:
            raise ConnectionError(explain(error, self.runs.pipeline.uri)) from error
