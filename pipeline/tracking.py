"""MLflow: one parent run for a pipeline, one child for each version of a stage; a re-run continues both.

Best effort by design. Every call of a StageTracker puts a record on a queue and returns; a background thread (see
`pipeline.spool`) imports mlflow, opens the database, creates the runs and sends. A dead server costs no training step:
the records wait in `mlflow_spool.jsonl` in the stage's folder. The run's ids are kept in `tracking.json` beside it,
which is also how a Ray worker finds the run that the driver made.

The only module that imports mlflow.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import logging
import math
import os
import re
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from pipeline.job import JobBase
from pipeline.provenance import IDS, code_versions, lineage, read_ids
from pipeline.schedule import flat
from pipeline.spool import Record, SpooledWriter
from pipeline.stage import Manifest, write_json_atomic

log = logging.getLogger("scldm.tracking")
SPOOL = "mlflow_spool.jsonl"
CLOSE_SECONDS = 20.0


class NullTracker:
    """Tracks nothing; the same methods."""

    def params(self, values: Mapping[str, Any]) -> None: ...
    def metrics(self, values: Mapping[str, float], step: int = 0) -> None: ...
    def tag(self, key: str, value: Any) -> None: ...
    def artifact(self, path: str | Path, folder: str | None = None) -> None: ...
    def finish(self, status: str = "FINISHED") -> None: ...
    def close(self) -> None: ...
    def ids(self) -> dict[str, str]:
        return {}

    def spec(self) -> dict[str, Any]:
        return {}


class StageTracker(NullTracker):
    """The run of one stage. No method raises or waits, but `close`, which waits at most 20 s."""

    def __init__(
        self,
        folder: Path,
        uri: str,
        writer: SpooledWriter,
        parent: Tracking | None = None,
        tags: Mapping[str, str] | None = None,
        inputs: Mapping[str, Manifest] | None = None,
    ) -> None:
        self.name = f"{folder.parent.name} {folder.name}"
        self.folder = folder
        self.uri = uri
        self.spool = folder / SPOOL
        self.skipped = 0  # metrics that were NaN or infinite
        self._writer = writer
        self._parent = parent  # None in a worker: the driver makes the run
        self._tags = tags or {}
        self._inputs = inputs or {}
        self._client: Any = None
        self._run_id: str | None = None

    @classmethod
    def attach(cls, spec: Mapping[str, Any]) -> NullTracker:
        """In a Ray worker (rank 0): the tracker that `spec()` described. Call `close()` at the end."""
        if not spec:
            return NullTracker()
        return cls(Path(spec["folder"]), spec["uri"], SpooledWriter(retry_seconds=3.0))

    def spec(self) -> dict[str, Any]:
        """Plain data for `attach`."""
        return {"folder": str(self.folder), "uri": self.uri}

    def params(self, values: Mapping[str, Any]) -> None:
        """Settings, flattened. Only those that the run does not hold yet are sent: MLflow never changes a param."""
        self._put("params", {_key(k): str(v)[:6000] for k, v in flat(values).items()})

    def metrics(self, values: Mapping[str, float], step: int = 0) -> None:
        """Numbers at a step. NaN and infinity are skipped and counted; the tag scldm.skipped_metrics says how many."""
        finite = {_key(k): float(v) for k, v in values.items() if math.isfinite(v)}
        self.skipped += len(values) - len(finite)
        if finite:
            self._put("metrics", {"values": finite, "step": int(step), "at": int(time.time() * 1000)})

    def tag(self, key: str, value: Any) -> None:
        self._put("tag", {_key(key): str(value)[:8000]})

    def artifact(self, path: str | Path, folder: str | None = None) -> None:
        """A file or folder, copied soon after: it must stay where it is."""
        self._put("artifact", {"path": str(path), "folder": folder})

    def finish(self, status: str = "FINISHED") -> None:
        """FINISHED, FAILED or KILLED."""
        if self.skipped:
            self.tag("scldm.skipped_metrics", self.skipped)
        self._put("status", status)

    def close(self) -> None:
        """Deliver what is queued, at most 20 s; the rest waits in the spool."""
        if self._parent is None:  # the driver's writer is shared, and closed by Tracking
            if self.skipped:
                self.tag("scldm.skipped_metrics", self.skipped)
            self._writer.close(CLOSE_SECONDS)

    def ids(self) -> dict[str, str]:
        """Run ids for the manifest; empty as long as the server has not answered."""
        return {k: str(v) for k, v in read_ids(self.folder).items()}

    def _put(self, kind: str, value: Any) -> None:
        self._writer.put(self, {"kind": kind, "value": value})

    # ---- in the background thread ----------------------------------------------------------------------------------
    def send(self, records: list[Record]) -> None:
        """Deliver; called by the writer's thread only."""
        if self._run_id is None:
            self._client, self._run_id = self._open()
        from mlflow.entities import Metric, RunTag

        metrics = [
            Metric(k, v, r["value"]["at"], r["value"]["step"])
            for r in records
            if r["kind"] == "metrics"
            for k, v in r["value"]["values"].items()
        ]
        tags = [RunTag(k, v) for r in records if r["kind"] == "tag" for k, v in r["value"].items()]
        self._send_params([r["value"] for r in records if r["kind"] == "params"])
        for start in range(0, len(metrics), 500):
            self._client.log_batch(self._run_id, metrics=metrics[start : start + 500])
        for start in range(0, len(tags), 100):
            self._client.log_batch(self._run_id, tags=tags[start : start + 100])
        for r in records:
            if r["kind"] == "artifact":
                self._send_artifact(r["value"]["path"], r["value"]["folder"])
            elif r["kind"] == "status":
                self._client.set_terminated(self._run_id, r["value"])

    def _send_params(self, sets: list[dict[str, str]]) -> None:
        if not sets:
            return
        from mlflow.entities import Param

        held = self._client.get_run(self._run_id).data.params
        new = {k: v for values in sets for k, v in values.items() if k not in held}
        params = [Param(k, v) for k, v in new.items()]
        for start in range(0, len(params), 100):
            self._client.log_batch(self._run_id, params=params[start : start + 100])

    def _send_artifact(self, path: str, folder: str | None) -> None:
        if not Path(path).exists():  # no use in trying again
            log.warning("tracking of %s: %s is gone and was not stored", self.name, path)
        elif Path(path).is_dir():
            self._client.log_artifacts(self._run_id, path, folder)
        else:
            self._client.log_artifact(self._run_id, path, folder)

    def _open(self) -> tuple[Any, str]:
        ids = read_ids(self.folder)
        if self._parent is None:
            if not ids:
                raise ConnectionError("the driver has not made the run yet")
            return mlflow_client(self.uri), ids["run_id"]
        return self._parent.open_stage(self.folder, ids, {**self._tags, **lineage(self._inputs)})


class Tracking:
    """Driver side: the pipeline's parent run, and the thread that all its stages' trackers share."""

    def __init__(self, job: JobBase, root: Path, source: str) -> None:
        self.root = root.absolute()
        self.folder = self.root / job.name
        given = job.tracking.uri or os.environ.get("MLFLOW_TRACKING_URI")  # MLflow's own name; clusters set it
        self.uri = given or f"sqlite:///{self.root / 'mlflow.db'}"
        self.local = given is None
        self.experiment = job.tracking.experiment or f"scldm/{job.name}"
        self.pipeline = f"{job.name}-{hashlib.sha256(str(self.folder).encode()).hexdigest()[:8]}"
        self.source = source
        self._name = job.name
        self._writer = SpooledWriter()
        self._client: Any = None
        self._experiment_id = ""
        self._parent_id = ""

    @classmethod
    def open(cls, job: JobBase, root: Path, source: str | Path = "") -> Tracking:
        """Returns at once; the database is opened in the background."""
        return cls(job, root, str(source))

    def stage(
        self, stage: str, stage_version: str, folder: Path, config: Mapping[str, Any], inputs: Mapping[str, Manifest]
    ) -> StageTracker:
        """The tracker of one stage. Its settings, lineage and resolved config are logged here."""
        tags = {
            "mlflow.runName": f"{stage} {stage_version}",
            "scldm.stage": stage,
            "scldm.version": stage_version,
            "scldm.config_hash": hashlib.sha256(json.dumps(config, sort_keys=True).encode()).hexdigest()[:12],
            "scldm.output_uri": str(folder),
        }
        tracker = StageTracker(folder, self.uri, self._writer, self, tags, inputs)
        tracker.params(config)
        if (folder / "config.yaml").is_file():
            tracker.artifact(folder / "config.yaml", "config")
        return tracker

    def close(self, status: str = "FINISHED") -> None:
        """End the parent run and deliver what is queued, at most 20 s."""
        self._writer.put(_Parent(self), {"kind": "status", "value": status})
        self._writer.close(CLOSE_SECONDS)

    # ---- in the background thread ----------------------------------------------------------------------------------
    def open_stage(self, folder: Path, ids: Mapping[str, Any], tags: Mapping[str, str]) -> tuple[Any, str]:
        """Continue the run that the stage's folder names, or make it."""
        client = self.open_parent()
        attempt = int(ids.get("attempt", 0)) + 1
        run_id = ids.get("run_id") if ids.get("uri") == self.uri else None
        if run_id is None:
            parent = {"mlflow.parentRunId": self._parent_id}
            run_id = client.create_run(self._experiment_id, tags={**self._common(), **tags, **parent}).info.run_id
        else:
            client.update_run(run_id, status="RUNNING")
        client.set_tag(run_id, "scldm.attempt", str(attempt))
        found = {"run_id": run_id, "parent_run_id": self._parent_id, "experiment_id": self._experiment_id}
        write_json_atomic(folder / IDS, {**found, "uri": self.uri, "attempt": attempt})
        return client, run_id

    def open_parent(self) -> Any:
        if self._client is not None:
            return self._client
        with self._alone():  # two processes that create one SQLite file at once break it
            client = mlflow_client(self.uri)
            found = client.get_experiment_by_name(self.experiment)
            place = (self.root / "mlartifacts").as_uri() if self.local else None
            self._experiment_id = (
                found.experiment_id if found else client.create_experiment(self.experiment, artifact_location=place)
            )
            query = f"tags.`scldm.pipeline` = '{self.pipeline}' and tags.`scldm.stage` = 'pipeline'"
            runs = client.search_runs([self._experiment_id], query, max_results=1)
            if runs:
                self._parent_id = runs[0].info.run_id
                client.update_run(self._parent_id, status="RUNNING")
            else:
                tags = {**self._common(), "mlflow.runName": self._name, "scldm.stage": "pipeline"}
                self._parent_id = client.create_run(self._experiment_id, tags=tags).info.run_id
        self._client = client
        return client

    @contextmanager
    def _alone(self) -> Iterator[None]:
        if not self.local:
            yield
            return
        self.root.mkdir(parents=True, exist_ok=True)
        with (self.root / ".mlflow.lock").open("w") as f:
            with contextlib.suppress(OSError):  # a file system without locks: no worse than without this
                fcntl.flock(f, fcntl.LOCK_EX)
            yield

    def _common(self) -> dict[str, str]:
        return {"scldm.pipeline": self.pipeline, "mlflow.source.name": self.source, **code_versions()}


class _Parent:
    """The parent run as a target of the writer."""

    def __init__(self, tracking: Tracking) -> None:
        self.name = "the pipeline"
        self.tracking = tracking
        self.spool = tracking.folder / ".mlflow_parent.jsonl"

    def send(self, records: list[Record]) -> None:
        client = self.tracking.open_parent()
        client.set_terminated(self.tracking._parent_id, records[-1]["value"])


def mlflow_client(uri: str) -> Any:
    """A client that gives up early: what it cannot send is spooled, so patience buys nothing."""
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "10")
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
    os.environ.setdefault("MLFLOW_LOGGING_LEVEL", "WARNING")
    logging.getLogger("alembic").setLevel(logging.WARNING)
    from mlflow import MlflowClient

    return MlflowClient(tracking_uri=uri)


def _key(name: str) -> str:
    """MLflow's alphabet for keys."""
    return re.sub(r"[^\w\-./: ]", "_", name)[:250]
