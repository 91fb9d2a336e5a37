"""Send to one MLflow run what it lacks, so that a record that is sent twice leaves nothing twice.

A point is held if the run has one of that metric at that step. Should two processes send it at the same moment,
MLflow's SQL stores keep one, because key, step, time and value are equal. Params are sent only if the run has none of
that name, tags if they differ, and in a replay files if the run has none of that name and size.

A value that the server refuses is left out with a warning, so that it cannot hold up the others.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterable, Sequence
from importlib.metadata import distributions
from pathlib import Path
from typing import Any

from pipeline.tracking.record_log import Record, last_status

log = logging.getLogger(__name__)
PER_REQUEST = {"metrics": 500, "params": 100, "tags": 100}
NOTE = "mlflow.note.content"
PACKAGES = Path("env/packages.txt")
REFUSALS = ("INVALID_PARAMETER_VALUE", "BAD_REQUEST")


class RunDelivery:
    """The run of one stage.

    Attributes:
        refused: What the server did not take, in words, since the last replay began.
    """

    def __init__(self, client: Any, run_id: str, name: str) -> None:
        self.client, self.run_id, self.name = client, run_id, name
        self.refused: list[str] = []
        self._run: Any = None  # as it was at the last replay, with what was sent since
        self._steps: dict[str, set[int]] = {}  # metric -> steps that the run held at the last replay
        self._warned: set[str] = set()

    def send(self, records: list[Record], *, replay: bool = False) -> Counter[str]:
        """Send records, without what the run holds already.

        Args:
            replay: These are all records of the stage: compare them with the run as it is now, and end it if they do.

        Returns:
            How many points, tags, … were sent.

        Raises:
            Exception: The server cannot be reached, or the run was deleted.
        """
        if replay or self._run is None:
            self._run, self._steps, self.refused = self._active_run(), {}, []
        sent: Counter[str] = Counter(params=self._send_params([r["value"] for r in records if r["kind"] == "params"]))
        sent["points"] = self._log("metrics", self._new_points(records, replay))
        sent["tags"] = self._send_tags({k: v for r in records if r["kind"] == "tag" for k, v in r["value"].items()})
        sent["data sets"] = self._send_datasets([d for r in records if r["kind"] == "datasets" for d in r["value"]])
        files = {_stored_as(r): r for r in records if r["kind"] in ("artifact", "packages")}
        sent["files"] = sum(map(self._send_file, self._missing(files) if replay else files.values()))
        status = last_status(records)
        if replay and status is not None and status["value"] not in ("RUNNING", self._run.info.status):
            self.client.set_terminated(self.run_id, status["value"], end_time=status["at"])
            sent["status"] = 1
        return +sent

    # ---- metrics, params, tags, data sets --------------------------------------------------------------------------
    def _new_points(self, records: Iterable[Record], replay: bool) -> list[Any]:
        """Return points at steps that the run does not hold."""
        from mlflow.entities import Metric

        by_key: dict[str, dict[int, Any]] = {}
        for r in records:
            if r["kind"] in ("metrics", "system"):  # system: of version 0.1.0, by seconds since the start of the run
                step = r["step"] if "step" in r else max(0, (r["at"] - self._run.info.start_time) // 1000)
                for key, value in r["value"].items():
                    by_key.setdefault(key, {}).setdefault(step, Metric(key, value, r["at"], step))
        new = []
        for key, points in by_key.items():
            if set(points) == {0} and key in self._run.data.metrics:
                continue  # all but training logs at step 0 alone, with many keys: no request for each of them
            if key not in self._steps:
                held = self.client.get_metric_history(self.run_id, key) if key in self._run.data.metrics else []
                self._steps[key] = {m.step for m in held}
            new += [p for step, p in points.items() if step not in self._steps[key]]
            if replay:  # what follows may have been on disk already; else a set would grow with the training
                self._steps[key] |= set(points)
        return new

    def _send_params(self, attempts: Sequence[dict[str, str]]) -> int:
        """Send params. MLflow never changes one: the first attempt's stay, a tag and the note say what changed."""
        from mlflow.entities import Param

        held, before = self._run.data.params, set(self._run.data.params)
        for values in attempts:
            held |= {k: v for k, v in values.items() if k not in held}
        changed = [
            f"{k} {held[k]} -> {v}" for values in attempts[-1:] for k, v in sorted(values.items()) if held[k] != v
        ]
        if changed:
            text, tags = "; ".join(changed)[:4000], self._run.data.tags
            line = f"Attempt {tags.get('scldm.attempt', '?')} continued with other settings: {text}"
            note = tags.get(NOTE, "")
            longer = f"{note}\n\n{line}".strip()[:8000] if line not in note else note
            self._send_tags({"scldm.changed_params": text, NOTE: longer})
        return self._log("params", [Param(k, v) for k, v in held.items() if k not in before])

    def _send_tags(self, tags: dict[str, str]) -> int:
        from mlflow.entities import RunTag

        new = {k: v for k, v in tags.items() if self._run.data.tags.get(k) != v}
        self._run.data.tags.update(new)
        return self._log("tags", [RunTag(k, v) for k, v in new.items()])

    def _send_datasets(self, described: list[dict[str, str]]) -> int:
        from mlflow.entities import Dataset, DatasetInput, InputTag

        held = {(i.dataset.name, i.dataset.digest) for i in self._run.inputs.dataset_inputs}
        inputs = []
        for given in described:
            dataset = Dataset(**{k: v for k, v in given.items() if k != "context"})
            if (dataset.name, dataset.digest) not in held:
                inputs.append(DatasetInput(dataset, [InputTag("mlflow.data.context", given["context"])]))
        if inputs:
            self.client.log_inputs(self.run_id, datasets=inputs)
        return len(inputs)

    def _log(self, kind: str, items: Sequence[Any], size: int | None = None) -> int:
        """Send metrics, params or tags in batches, one by one if a batch is refused. Returns how many were taken."""
        from mlflow.exceptions import MlflowException

        taken, size = 0, size or PER_REQUEST[kind]
        for start in range(0, len(items), size):
            batch = list(items[start : start + size])
            try:
                self.client.log_batch(self.run_id, **{kind: batch})
                taken += len(batch)
            except MlflowException as error:
                if error.error_code not in REFUSALS:
                    raise
                self._active_run()  # a deleted run refuses everything, which is not the fault of a value
                if len(batch) > 1:
                    taken += self._log(kind, batch, max(1, len(batch) // 8))
                else:
                    self._refuse(f"{batch[0].key} is refused", error)
        return taken

    def _refuse(self, what: str, error: Exception) -> None:
        cause = (str(error).splitlines() or [type(error).__name__])[0][:200]
        self.refused.append(what)
        if what not in self._warned:
            log.warning("tracking of %s: %s: %s", self.name, what, cause)
        self._warned.add(what)

    def _active_run(self) -> Any:
        run = self.client.get_run(self.run_id)
        if run.info.lifecycle_stage != "active":
            raise RuntimeError(f"run {self.run_id} was deleted")
        return run

    # ---- files -----------------------------------------------------------------------------------------------------
    def _missing(self, files: dict[Path, Record]) -> list[Record]:
        """Return the files that the run does not hold, or holds with another size."""
        sizes: dict[str, int | None] = {}
        for parent in {name.parent for name in files}:
            try:
                found = self.client.list_artifacts(self.run_id, None if parent == Path() else str(parent))
                sizes |= {f.path: f.file_size for f in found}
            except Exception:  # an artifact store that cannot be listed: the upload shows what is wrong with it
                self._server_answers()
        return [r for name, r in files.items() if str(name) not in sizes or _size(r) not in (None, sizes[str(name)])]

    def _send_file(self, record: Record) -> bool:
        """Store a file. If the artifact store refuses (full, read-only), numbers are still sent."""
        name = _stored_as(record)
        try:
            if record["kind"] == "packages":
                packages = sorted({f"{d.metadata['Name']}=={d.version}" for d in distributions()}, key=str.lower)
                self.client.log_text(self.run_id, "\n".join(packages) + "\n", str(name))
            elif (path := Path(record["value"]["path"])).exists():
                self.client.log_artifact(self.run_id, str(path), record["value"]["folder"])
            else:  # it will never be stored, so it must not be reported as missing
                log.warning("tracking of %s: %s is gone and was not stored", self.name, path)
                return False
        except Exception as error:
            self._server_answers()
            self._refuse(f"{name} is not stored", error)
            return False
        return True

    def _server_answers(self) -> None:
        """Raise if it is the server that is away, and not its artifact store."""
        try:
            self.client.get_run(self.run_id)
        except Exception:  # after an upload that it refused half-way, a server closes the connection that is used next
            self.client.get_run(self.run_id)


def _stored_as(record: Record) -> Path:
    """Return the path of a file within the run."""
    if record["kind"] == "packages":
        return PACKAGES
    return Path(record["value"]["folder"] or "") / Path(record["value"]["path"]).name


def _size(record: Record) -> int | None:
    """Return the size of a file that could be stored; None if it has none or is gone."""
    path = Path(record["value"]["path"]) if record["kind"] == "artifact" else PACKAGES
    return path.stat().st_size if path.exists() else None
