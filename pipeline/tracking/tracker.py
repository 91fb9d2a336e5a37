"""Log the stages of a pipeline to MLflow: one parent run for the pipeline, one child run for each version of a stage.

Tracking is best effort and never in the critical path. Every call of a StageTracker appends a record to the tracking
log in the stage's folder (see `record_log`) and queues it; a background thread (see `sender`) imports mlflow, opens the
database, creates the runs and sends (see `mlflow_runs`). If the server is away, nothing is kept for it: once it answers
again, at the end of the stage, in the next attempt, or by `scldm mlflow sync`, the run is completed from the files.
The ids of the run are kept in `tracking.json`, through which a Ray worker finds the run that the driver created.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pipeline.config.job import JobBase
from pipeline.core.manifest import MANIFEST, Manifest
from pipeline.core.nested import flat
from pipeline.tracking.mlflow_runs.client import clean_key, clean_keys, clean_metrics, explain, mlflow_client
from pipeline.tracking.mlflow_runs.delivery import RunDelivery
from pipeline.tracking.mlflow_runs.runs import Opening, ParentRun, Pipeline, PipelineRuns
from pipeline.tracking.provenance import code_versions, datasets, inputs_of, read_ids, settings_behind
from pipeline.tracking.record_log import DRIVER_LOG, METRICS, WORKER_LOG, Record, RecordLog, last_status, read_logs
from pipeline.tracking.sender import BackgroundSender, NotReadyError

CLOSE_SECONDS = 20.0
DRIVER_RETRY_SECONDS = 20.0
WORKER_RETRY_SECONDS = 3.0  # short: usually the driver is about to create the run


class NullTracker:
    """Track nothing, with the methods of StageTracker."""

    def metrics(self, values: Mapping[str, float], step: int = 0, *, time_ms: int | None = None) -> None: ...
    def tag(self, key: str, value: Any) -> None: ...
    def artifact(self, path: str | Path, folder: str | None = None) -> None: ...
    def describe(self, manifest: Manifest) -> None: ...
    def finish(self, status: str = "FINISHED") -> None: ...
    def close(self) -> None: ...
    def ids(self) -> dict[str, str]:
        """Return no run ids."""
        return {}

    def spec(self) -> dict[str, Any]:
        """Return what `StageTracker.attach` turns into a NullTracker."""
        return {}


class StageTracker(NullTracker):
    """The run of one stage. No method raises, and none waits but `close`, which waits at most 20 s.

    Args:
        folder: The stage's folder.
        uri: Tracking URI of MLflow.
        runs: The pipeline's runs; None in a worker, because the driver creates the run.
        opening: What the run is created from; given with `runs`.
    """

    def __init__(
        self,
        folder: Path,
        uri: str,
        sender: BackgroundSender,
        runs: PipelineRuns | None = None,
        opening: Opening | None = None,
    ) -> None:
        self.name = f"{folder.parent.name} {folder.name}"
        self.folder = folder
        self.uri = uri
        self.skipped = 0  # metrics that were NaN or infinite
        self._log = RecordLog(folder / (WORKER_LOG if runs is None else DRIVER_LOG))
        self._sender = sender
        self._runs = runs
        self._opening = opening
        self._delivery: RunDelivery | None = None

    @classmethod
    def attach(cls, spec: Mapping[str, Any]) -> NullTracker:
        """Return, in a Ray worker, the tracker that `spec()` described. Call `close()` at the end."""
        if not spec:
            return NullTracker()
        return cls(Path(spec["folder"]), spec["uri"], BackgroundSender(retry_seconds=WORKER_RETRY_SECONDS))

    def spec(self) -> dict[str, Any]:
        """Return plain data for `attach`."""
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

    def describe(self, manifest: Manifest) -> None:
        """Log what is known only when the stage has finished: its manifest, and the data sets that ingest has made."""
        self.artifact(self.folder / MANIFEST, "manifests")
        if digest := manifest.facts.get("digest"):
            self.tag("scldm.data_digest", digest)
            name = self._opening.pipeline.name if self._opening is not None else manifest.stage
            self._put_datasets(datasets(manifest.stage, manifest.config, manifest, name))
        if census := manifest.facts.get("census_version"):
            self.tag("scldm.census_version", census)

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

    def finish(self, status: str = "FINISHED") -> None:
        """End the run as FINISHED, FAILED or KILLED, after all that it misses was sent."""
        self._tag_skipped()
        self._put("status", status)

    def close(self) -> None:
        """Send what is queued, for at most 20 s. The driver's thread is shared, and closed by Tracking."""
        if self._runs is None:
            self._tag_skipped()
            self._sender.close(CLOSE_SECONDS)

    def ids(self) -> dict[str, str]:
        """Return run ids for the manifest; empty as long as the server has not answered."""
        return {k: str(v) for k, v in read_ids(self.folder).items()}

    def _tag_skipped(self) -> None:
        if self.skipped:
            self.tag("scldm.skipped_metrics", self.skipped)

    def _put_datasets(self, described: list[dict[str, str]]) -> None:
        if described:
            self._put("datasets", described)

    def _put(self, kind: str, value: Any, *, time_ms: int | None = None, **more: Any) -> None:
        record = {"kind": kind, "value": value, "at": time_ms or int(time.time() * 1000), **more}
        if time_ms is None:
            self._log.append(record)
        self._sender.put(self, record)

    # ---- in the background thread ----------------------------------------------------------------------------------
    def deliver(self, records: list[Record], *, replay: bool) -> None:
        """Send records, or complete the run from disk; called by the sender's thread only.

        The worker completes the metrics at its start, so that what an earlier attempt left comes before its own points.
        The driver does so at the end, when no worker writes any more.
        """
        try:
            if self._delivery is None:
                self._delivery = RunDelivery(*self._open_run(), self.name)
                replay = replay or self._runs is None
            ends = any(r["kind"] == "status" and r["value"] != "RUNNING" for r in records)
            if not (replay or ends):
                self._delivery.send(records)
                return
            if self._runs is None:
                recorded = read_logs(self.folder, WORKER_LOG, METRICS)
            else:
                recorded = read_logs(self.folder, DRIVER_LOG)
                status = last_status([*recorded, *records])
                if status is not None and status["value"] != "RUNNING":
                    recorded = read_logs(self.folder)
            self._delivery.send([*recorded, *records], replay=True)
        except NotReadyError:
            raise
        except Exception as error:
            raise ConnectionError(explain(error, self.uri)) from error

    def _open_run(self) -> tuple[Any, str]:
        if self._runs is not None and self._opening is not None:
            return self._runs.open_stage(self.folder, self._opening)
        ids = read_ids(self.folder)
        if ids.get("uri") != self.uri:  # none yet, or that of an earlier attempt with another server
            raise NotReadyError("the driver has not created the run yet")
        return mlflow_client(self.uri), ids["run_id"]


class Tracking:
    """Driver side: the pipeline's parent run, and the thread that the trackers of all its stages share."""

    def __init__(self, job: JobBase, root: Path, source: str) -> None:
        self.root = root.absolute()
        self.folder = self.root / job.name
        given = job.tracking.uri or os.environ.get("MLFLOW_TRACKING_URI")  # MLflow's own name; clusters set it
        self.uri = given or f"sqlite:///{self.root / 'mlflow.db'}"
        self.seed = job.seed
        key = f"{job.name}-{hashlib.sha256(str(self.folder).encode()).hexdigest()[:8]}"
        self.pipeline = Pipeline(
            uri=self.uri,
            local=given is None,
            root=str(self.root),
            experiment=job.tracking.experiment or f"scldm/{job.name}",
            name=job.name,
            key=key,
            began=int(time.time() * 1000),
            tags={"scldm.pipeline": key, "mlflow.source.name": source, **code_versions()},
        )
        self._runs = PipelineRuns(self.pipeline)
        self._parent = ParentRun(self._runs, self.folder)
        self._sender = BackgroundSender(retry_seconds=DRIVER_RETRY_SECONDS)

    @classmethod
    def open(cls, job: JobBase, root: Path, source: str | Path = "") -> Tracking:
        """Return without waiting; the database is opened in the background.

        Args:
            root: Output folder of all pipelines.
            source: Job file.
        """
        return cls(job, root, str(source))

    def stage(
        self, stage: str, stage_version: str, folder: Path, config: Mapping[str, Any], inputs: Mapping[str, Manifest]
    ) -> StageTracker:
        """Return the tracker of one stage, whose settings, inputs, data sets and resolved job are logged."""
        tags = {
            "mlflow.runName": f"{stage}-{self.pipeline.name}-{stage_version[:8]}-s{self.seed}",
            "scldm.stage": stage,
            "scldm.version": stage_version,
            "scldm.seed": str(self.seed),
            "scldm.config_hash": hashlib.sha256(json.dumps(config, sort_keys=True).encode()).hexdigest()[:12],
            "scldm.output_uri": str(folder),
        }
        opening = Opening(self.pipeline, tags, inputs_of(inputs), int(time.time() * 1000))
        opening.write(folder)
        self._parent.record(self._status("RUNNING"))
        tracker = StageTracker(folder, self.uri, self._sender, self._runs, opening)
        described = datasets(stage, config, inputs["ingest"], self.pipeline.name) if "ingest" in inputs else []
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
