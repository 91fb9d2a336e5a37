"""What stages say of themselves to MLflow: one parent run for a pipeline, one child for each version of a stage.

Best effort by design. Every call of a StageTracker puts a record on a queue and returns; a background thread (see
`spool`) imports mlflow, opens the database, creates the runs and sends (`mlflow_runs`). A dead server
costs no training step: the records wait in `mlflow_spool*.jsonl` in the stage's folder, and the next attempt or
`scldm mlflow sync` sends them. The run's ids are kept in `tracking.json` beside them, which is also how a Ray worker
finds the run that the driver made.
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
from pipeline.tracking.mlflow_runs.client import clean_key, clean_keys, explain
from pipeline.tracking.mlflow_runs.client import mlflow_client as mlflow_client
from pipeline.tracking.mlflow_runs.delivery import Delivery
from pipeline.tracking.mlflow_runs.runs import Opening, ParentTarget, Pipeline, PipelineRuns
from pipeline.tracking.provenance import code_versions, datasets, inputs_of, read_ids, settings_behind
from pipeline.tracking.spool import NotReadyError, SpooledWriter
from pipeline.tracking.spool_file import Record, waiting

SPOOL = "mlflow_spool.jsonl"
SPOOLS = "mlflow_spool*.jsonl"  # also those of workers
CLOSE_SECONDS = 20.0
WORKER_RETRY_SECONDS = 3.0  # the driver may still be making the run


class NullTracker:
    """Tracks nothing; the same methods."""

    def params(self, values: Mapping[str, Any]) -> None: ...
    def metrics(self, values: Mapping[str, float], step: int = 0) -> None: ...
    def system(self, values: Mapping[str, float]) -> None: ...
    def tag(self, key: str, value: Any) -> None: ...
    def artifact(self, path: str | Path, folder: str | None = None) -> None: ...
    def describe(self, manifest: Manifest) -> None: ...
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
        runs: PipelineRuns | None = None,
        opening: Opening | None = None,
        spool: str = SPOOL,
    ) -> None:
        self.name = f"{folder.parent.name} {folder.name}"
        self.folder = folder
        self.uri = uri
        self.spool = folder / spool
        self.skipped = 0  # metrics that were NaN or infinite
        self._writer = writer
        self._runs = runs  # None in a worker: the driver makes the run
        self._opening = opening
        self._delivery: Delivery | None = None
        self._since = None if runs is not None else int(time.time() * 1000)  # a worker may repeat steps

    @classmethod
    def attach(cls, spec: Mapping[str, Any], who: str = "worker") -> NullTracker:
        """In a Ray worker: the tracker that `spec()` described. Call `close()` at the end.

        Args:
            who: Names its spool. Two processes on two machines may not append to one file of a network file system.
        """
        if not spec:
            return NullTracker()
        writer = SpooledWriter(retry_seconds=WORKER_RETRY_SECONDS)
        return cls(Path(spec["folder"]), spec["uri"], writer, spool=SPOOLS.replace("*", f".{who}"))

    def spec(self) -> dict[str, Any]:
        """Plain data for `attach`."""
        return {"folder": str(self.folder), "uri": self.uri}

    def params(self, values: Mapping[str, Any]) -> None:
        """Settings, flattened. Only those that the run does not hold yet are sent: MLflow never changes a param."""
        self._put("params", clean_keys({k: str(v)[:6000] for k, v in flat(values).items()}))

    def metrics(self, values: Mapping[str, float], step: int = 0) -> None:
        """Numbers at a step. NaN and infinity are skipped and counted; the tag scldm.skipped_metrics says how many."""
        finite = {k: float(v) for k, v in values.items() if math.isfinite(v)}
        self.skipped += len(values) - len(finite)
        if finite:
            self._put("metrics", clean_keys(finite), step=int(step))

    def system(self, values: Mapping[str, float]) -> None:
        """Numbers of a machine; their step is the number of seconds since the run began."""
        self._put("system", clean_keys({k: float(v) for k, v in values.items() if math.isfinite(v)}))

    def tag(self, key: str, value: Any) -> None:
        self._put("tag", {clean_key(key): str(value)[:8000]})

    def artifact(self, path: str | Path, folder: str | None = None) -> None:
        """A file or folder, copied soon after: it must stay where it is."""
        self._put("artifact", {"path": str(path), "folder": folder})

    def datasets(self, described: list[dict[str, str]]) -> None:
        """See `pipeline.tracking.provenance.datasets`."""
        if described:
            self._put("datasets", described)

    def describe(self, manifest: Manifest) -> None:
        """What is known only when the stage has finished: its manifest, and the data that ingest has fixed."""
        self.artifact(self.folder / MANIFEST, "manifests")
        if digest := manifest.facts.get("digest"):
            self.tag("scldm.data_digest", digest)
            name = self._opening.pipeline.name if self._opening is not None else manifest.stage
            self.datasets(datasets(manifest.stage, manifest.config, manifest, name))
        if census := manifest.facts.get("census_version"):
            self.tag("scldm.census_version", census)

    def finish(self, status: str = "FINISHED") -> None:
        """FINISHED, FAILED or KILLED."""
        if self.skipped:
            self.tag("scldm.skipped_metrics", self.skipped)
        self._put("status", status)

    def close(self) -> None:
        """Deliver what is queued, at most 20 s; the rest waits in the spool."""
        if self._runs is None:  # the driver's writer is shared, and closed by Tracking
            if self.skipped:
                self.tag("scldm.skipped_metrics", self.skipped)
            self._writer.close(CLOSE_SECONDS)

    def ids(self) -> dict[str, str]:
        """Run ids for the manifest; empty as long as the server has not answered."""
        return {k: str(v) for k, v in read_ids(self.folder).items()}

    def _put(self, kind: str, value: Any, **more: Any) -> None:
        self._writer.put(self, {"kind": kind, "value": value, "at": int(time.time() * 1000), **more})

    # ---- in the background thread ----------------------------------------------------------------------------------
    def spools(self) -> list[Path]:
        """A worker sends its own; the driver, which ends last, what workers have left too."""
        return waiting(self.folder, SPOOLS if self._runs is not None else self.spool.name)

    def send(self, records: list[Record]) -> list[Record]:
        """Deliver; called by the writer's thread only."""
        try:
            if self._delivery is None:
                self._delivery = Delivery(*self._open(), self.name, since=self._since)
            return self._delivery.send(records)
        except NotReadyError:
            raise
        except Exception as error:
            raise ConnectionError(explain(error, self.uri)) from error

    def _open(self) -> tuple[Any, str]:
        if self._runs is not None and self._opening is not None:
            return self._runs.open_stage(self.folder, self._opening)
        ids = read_ids(self.folder)
        if not ids:
            raise NotReadyError("the driver has not made the run yet")
        return mlflow_client(self.uri), ids["run_id"]


class Tracking:
    """Driver side: the pipeline's parent run, and the thread that all its stages' trackers share."""

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
        self._writer = SpooledWriter()

    @classmethod
    def open(cls, job: JobBase, root: Path, source: str | Path = "") -> Tracking:
        """Returns at once; the database is opened in the background."""
        return cls(job, root, str(source))

    def stage(
        self, stage: str, stage_version: str, folder: Path, config: Mapping[str, Any], inputs: Mapping[str, Manifest]
    ) -> StageTracker:
        """The tracker of one stage. Its settings, lineage, data sets and resolved config are logged here."""
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
        tracker = StageTracker(folder, self.uri, self._writer, self._runs, opening)
        tracker.params({**config, **(settings_behind(inputs) if stage == "evaluate" else {})})
        if "ingest" in inputs:
            tracker.datasets(datasets(stage, config, inputs["ingest"], self.pipeline.name))
        if (folder / "config.yaml").is_file():
            tracker.artifact(folder / "config.yaml", "config")
        tracker._put("packages", None)
        return tracker

    def close(self, status: str = "FINISHED") -> None:
        """End the parent run and deliver what is queued, at most 20 s."""
        self._writer.put(
            ParentTarget(self._runs, self.folder),
            {"kind": "status", "value": status, "at": int(time.time() * 1000)},
        )
        self._writer.close(CLOSE_SECONDS)
