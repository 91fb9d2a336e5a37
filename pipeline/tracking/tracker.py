"""Log the stages of a pipeline to MLflow: one parent run for the pipeline, one child run for each version of a stage.

Tracking is best effort and never in the critical path. Every call of a StageTracker appends a record to the tracking
log in the stage's folder (see `record_log`) and queues it; a background thread (see `sender`) imports mlflow, opens the
database, creates the runs and sends (see `mlflow_runs`). If the server is away, nothing is kept for it: once it answers
again, at the end of the stage, in the next attempt, or by `scldm mlflow sync`, the run is completed from the files.
The ids of the run are kept in `tracking.json`, through which a Ray worker finds the run that the driver created.
"""

from __future__ import annotations

import logging
import math
import os
import time
from abc import ABC, abstractmethod
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from pipeline.config.job import JobBase, experiment_name
from pipeline.core.manifest import MANIFEST, Manifest
from pipeline.core.nested import flat
from pipeline.tracking.mlflow_runs.client import clean_key, clean_keys, clean_metrics, explain, mlflow_client
from pipeline.tracking.mlflow_runs.delivery import RunDelivery
from pipeline.tracking.mlflow_runs.pipeline_key import pipeline_key, record_key
from pipeline.tracking.mlflow_runs.runs import OPENING, Opening, ParentRun, Pipeline, PipelineRuns
from pipeline.tracking.provenance import datasets, inputs_of, read_ids, settings_behind
from pipeline.tracking.record_log import DRIVER_LOG, METRICS, WORKER_LOG, Record, RecordLog, last_status, read_logs
from pipeline.tracking.sender import BackgroundSender, NotReadyError
from pipeline.tracking.tags import data_tags, pipeline_tags, stage_tags

log = logging.getLogger(__name__)
CLOSE_SECONDS = 20.0
DRIVER_RETRY_SECONDS = 20.0
WORKER_RETRY_SECONDS = 3.0  # short: usually the driver is about to create the run


class NullTracker:
    """Track nothing. A `pipeline.config.context.Tracker`."""

    def metrics(self, values: Mapping[str, float], step: int = 0, *, time_ms: int | None = None) -> None: ...
    def tag(self, key: str, value: Any) -> None: ...
    def artifact(self, path: str | Path, folder: str | None = None) -> None: ...
    def close(self) -> None: ...
    def spec(self) -> dict[str, Any]:
        """Return what `attach_tracker` turns into a NullTracker."""
        return {}


class StageTracker(ABC):
    """What the driver's and the worker's tracker of a stage share. A `pipeline.config.context.Tracker`.

    No method raises or waits for the server; a call appends a record to a file in the stage's folder and queues it.

    Args:
        folder: The stage's folder.
        uri: Tracking URI of MLflow.
        log_name: Name of the tracking log, which no other process writes.
    """

    def __init__(self, folder: Path, uri: str, sender: BackgroundSender, *, log_name: str) -> None:
        self.name = f"{folder.parent.name} {folder.name}"
        self.folder = folder
        self.uri = uri
        self.skipped = 0  # metrics that were NaN or infinite
        self._log = RecordLog(folder / log_name)
        self._sender = sender
        self._delivery: RunDelivery | None = None

    def spec(self) -> dict[str, Any]:
        """Return plain data for `attach_tracker`."""
        return {"folder": str(self.folder), "uri": self.uri}

    def metrics(self, values: Mapping[str, float], step: int = 0, *, time_ms: int | None = None) -> None:
        """Log numbers at a step.

        NaN and infinity are left out and counted in the tag scldm.skipped_metrics.

        Args:
            time_ms: Given if the caller has written the values to metrics.jsonl, with this time: they are not recorded
                again. It must be the same time, by which MLflow recognizes a point that is sent twice.
        """
        self.skipped += sum(not math.isfinite(v) for v in values.values())
        if finite := clean_metrics(values):
            self._put("metrics", finite, time_ms=time_ms, step=int(step))

    def tag(self, key: str, value: Any) -> None:
        """Set a tag of the run."""
        self._put("tag", {clean_key(key): str(value)[:8000]})

    def artifact(self, path: str | Path, folder: str | None = None) -> None:
        """Store a file with the run. It is read later, so it must stay where it is."""
        self._put("artifact", {"path": str(path), "folder": folder})

    def _tag_skipped(self) -> None:
        if self.skipped:
            self.tag("scldm.skipped_metrics", self.skipped)

    def _put(self, kind: str, value: Any, *, time_ms: int | None = None, **more: Any) -> None:
        record = {"kind": kind, "value": value, "at": time_ms or int(time.time() * 1000), **more}
        if time_ms is None:
            self._log.append(record)
        self._sender.put(self, record)

    # ---- in the background thread ----------------------------------------------------------------------------------
    def deliver(self, records: list[Record], *, replay: bool) -> None:
        """Send records, or complete the run from disk; called by the sender's thread only."""
        try:
            self._deliver(records, replay)
        except NotReadyError:
            raise
        except Exception as error:
            raise ConnectionError(explain(error, self.uri)) from error

    @abstractmethod
    def _deliver(self, records: list[Record], replay: bool) -> None:
        """Send records. After a failure, which `replay` tells, send all that the run misses."""


class DriverTracker(StageTracker):
    """The driver's tracker of a stage. It creates the run, and ends it.

    Its thread is shared with the trackers of the other stages, and closed by `Tracking`.

    Args:
        runs: The pipeline's runs.
        opening: What the run is created from.
    """

    def __init__(
        self, folder: Path, uri: str, sender: BackgroundSender, *, runs: PipelineRuns, opening: Opening
    ) -> None:
        super().__init__(folder, uri, sender, log_name=DRIVER_LOG)
        self._runs = runs
        self._opening = opening

    def begin(self, config: Mapping[str, Any], described: list[dict[str, str]]) -> None:
        """Begin an attempt: log its settings, data sets, resolved job and installed packages.

        Args:
            config: Settings, nested. MLflow never changes a param, so a later attempt adds only new ones.
            described: See `pipeline.tracking.provenance.datasets`.
        """
        self._put("status", "RUNNING")
        self._put("params", clean_keys({k: str(v)[:6000] for k, v in flat(config).items()}))
        self._put_datasets(described)
        if (self.folder / "config.yaml").is_file():
            self.artifact(self.folder / "config.yaml", "config")
        self._put("packages", None)

    def describe(self, manifest: Manifest) -> None:
        """Log what is known only when the stage has finished: its manifest, and the data sets that ingest has made."""
        self.artifact(self.folder / MANIFEST, "manifests")
        for key, value in data_tags(manifest.facts).items():
            self.tag(key, value)
        self._put_datasets(datasets(manifest.stage, manifest.config, manifest, self._opening.pipeline.name))

    def finish(self, status: str = "FINISHED") -> None:
        """End the run as FINISHED, FAILED or KILLED, after all that it misses was sent."""
        self._tag_skipped()
        self._put("status", status)

    def ids(self) -> dict[str, str]:
        """Return run ids for the manifest; empty as long as the server has not answered."""
        return {k: str(v) for k, v in read_ids(self.folder).items()}

    def _put_datasets(self, described: list[dict[str, str]]) -> None:
        if described:
            self._put("datasets", described)

    def _deliver(self, records: list[Record], replay: bool) -> None:
        """Send records; after a failure and at the stage's end, send all that the run misses.

        What workers logged is read only at the end, when none of them writes any more.
        """
        if self._delivery is None:
            self._delivery = RunDelivery(*self._runs.open_stage(self.folder, self._opening), self.name)
        if not (replay or _has_ended(records)):
            self._delivery.send(records)
            return
        recorded = read_logs(self.folder, DRIVER_LOG)
        if _has_ended([*recorded, *records]):
            recorded = read_logs(self.folder)
        self._delivery.send([*recorded, *records], replay=True)


class WorkerTracker(StageTracker):
    """The tracker of rank 0 of a training, in its own process. It waits for the driver to create the run."""

    def __init__(self, folder: Path, uri: str, sender: BackgroundSender) -> None:
        super().__init__(folder, uri, sender, log_name=WORKER_LOG)

    def close(self) -> None:
        """Send what is queued. Waits for the server, at most 20 s."""
        self._tag_skipped()
        self._sender.close(CLOSE_SECONDS)

    def _deliver(self, records: list[Record], replay: bool) -> None:
        """Send records; at the start and after a failure, send all that the run misses of this and earlier attempts.

        At the start, so that what an earlier attempt left comes before the points of this one.
        """
        first = self._delivery is None
        if self._delivery is None:
            self._delivery = RunDelivery(*self._find_run(), self.name)
        if first or replay:
            self._delivery.send([*read_logs(self.folder, WORKER_LOG, METRICS), *records], replay=True)
        else:
            self._delivery.send(records)

    def _find_run(self) -> tuple[Any, str]:
        ids = read_ids(self.folder)
        if ids.get("uri") != self.uri:  # none yet, or that of an earlier attempt with another server
            raise NotReadyError("the driver has not created the run yet")
        return mlflow_client(self.uri), ids["run_id"]


def attach_tracker(spec: Mapping[str, Any]) -> WorkerTracker | NullTracker:
    """Return, in a worker, the tracker that `Tracker.spec` described. Call `close()` at the end.

    Args:
        spec: Empty if nothing is to be tracked.
    """
    if not spec:
        return NullTracker()
    return WorkerTracker(Path(spec["folder"]), spec["uri"], BackgroundSender(retry_seconds=WORKER_RETRY_SECONDS))


def _has_ended(records: list[Record]) -> bool:
    """Return whether the newest status among the records ends the run."""
    status = last_status(records)
    return status is not None and status["value"] != "RUNNING"


class Tracking:
    """The driver's side: the pipeline's parent run, and the thread that the trackers of all its stages share.

    As a context manager it ends the parent run: FINISHED, KILLED by Ctrl+C or an exit, or FAILED by another exception.
    The database is opened in the background. The constructor waits for git, at most 10 s; `stage` waits for the disk;
    only `close` waits for the server.

    Args:
        root: Output folder of all pipelines.
        source: Job file and settings of the command line, for the record.
    """

    def __init__(self, job: JobBase, root: Path, source: str = "") -> None:
        self.root = root.absolute()
        self.folder = self.root / job.name
        given = job.tracking.uri or os.environ.get("MLFLOW_TRACKING_URI")  # MLflow's own name; clusters set it
        self.uri = given or f"sqlite:///{self.root / 'mlflow.db'}"
        self.seed = job.seed
        key = pipeline_key(self.folder, local=given is None)
        self.pipeline = Pipeline(
            uri=self.uri,
            local=given is None,
            root=str(self.root),
            experiment=experiment_name(job),
            name=job.name,
            key=key,
            began=int(time.time() * 1000),
            tags=pipeline_tags(key, source),
        )
        self._runs = PipelineRuns(self.pipeline)
        self._parent = ParentRun(self._runs, self.folder)
        self._sender = BackgroundSender(retry_seconds=DRIVER_RETRY_SECONDS)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if kind is None:
            self.close("FINISHED")
        else:
            self.close("KILLED" if issubclass(kind, (KeyboardInterrupt, SystemExit)) else "FAILED")

    def stage(
        self, stage: str, stage_version: str, folder: Path, config: Mapping[str, Any], inputs: Mapping[str, Manifest]
    ) -> DriverTracker:
        """Return the tracker of one stage, whose settings, inputs, data sets and resolved job are logged."""
        name = self.pipeline.name
        tags = stage_tags(stage, stage_version, pipeline=name, seed=self.seed, config=config, folder=folder)
        opening = Opening(self.pipeline, tags, inputs_of(inputs), int(time.time() * 1000))
        try:
            record_key(self.folder, self.pipeline.key)
            opening.write(folder)
        except OSError as error:
            log.warning(
                "%s cannot be written (%s): if the server stays away, scldm mlflow sync cannot create the run of %s",
                folder / OPENING, error, stage,
            )  # fmt: skip
        self._parent.record(self._status("RUNNING"))
        tracker = DriverTracker(folder, self.uri, self._sender, runs=self._runs, opening=opening)
        described = datasets(stage, config, inputs["ingest"], name) if "ingest" in inputs else []
        tracker.begin({**config, **(settings_behind(inputs) if stage == "evaluate" else {})}, described)
        return tracker

    def close(self, status: str = "FINISHED") -> None:
        """End the parent run and send what is queued, for at most 20 s."""
        record = self._status(status)
        self._parent.record(record)
        self._sender.put(self._parent, record)
        self._sender.close(CLOSE_SECONDS)

    def _status(self, status: str) -> Record:
        return {"kind": "status", "value": status, "at": int(time.time() * 1000)}
