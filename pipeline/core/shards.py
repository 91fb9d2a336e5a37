"""Atomic commits of shards: the files that a batch job writes one by one and resumes from after a crash.

A shard is written under a temporary name, flushed to disk, renamed into place, and described by a JSON record in the
same folder. The record is written last, so a record means that its shard is complete. A process may be killed between
any two of these steps: what it leaves is either a temporary file, which nobody reads, or a shard without a record,
which is written again.

Readers trust records, not file names: `ShardStore.committed` returns the records whose file still has its checksum.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.core.faults import fault_point
from pipeline.core.files import TMP, file_digest, flush_to_disk, temporary_path, write_json_atomic

Record = dict[str, Any]  # of a shard: `file`, `sha256`, and what its writer adds


@dataclass(frozen=True)
class CommitPoints:
    """Names of the fault points that every commit of a store passes (`pipeline.core.fault_points`)."""

    before_rename: str  # the shard is complete and on disk, under its temporary name
    before_record: str  # the shard has its name, and no record yet
    after_record: str  # the shard and its record are committed


@dataclass(frozen=True)
class ShardStore:
    """Shards of one folder and their records.

    Args:
        folder: Folder of the shards; exists before the first commit.
        points: Fault points of a commit.
        prefix: Put before a shard's name in its record, for records that name files from a parent folder.
    """

    folder: Path
    points: CommitPoints
    prefix: str = ""

    def commit(
        self, name: str, write: Callable[[Path], Mapping[str, Any]], *, record_name: str | None = None
    ) -> Record:
        """Write a shard and its record.

        Args:
            name: File name of the shard. `{digest}` in it stands for the first 12 digits of the file's sha256.
            write: Writes the shard to the path that it is given, and returns further fields of the record.
            record_name: File name of the record; `<name>.json` if None.

        Returns:
            The record: the fields of `write`, then `file` and `sha256`.
        """
        tmp = temporary_path(self.folder / name.replace("{digest}", ""))
        try:
            fields = write(tmp)
            flush_to_disk(tmp)
            sha256 = file_digest(tmp)
            path = self.folder / name.replace("{digest}", sha256[:12])
            fault_point(self.points.before_rename)
            tmp.replace(path)
        finally:
            tmp.unlink(missing_ok=True)
        fault_point(self.points.before_record)
        record = {**fields, "file": f"{self.prefix}{path.name}", "sha256": sha256}
        write_json_atomic(self.folder / (record_name or f"{path.name}.json"), record)
        fault_point(self.points.after_record)
        return record

    def record(self, record_name: str) -> Record | None:
        """Return a shard's record, or None if there is no valid record or no file that it describes."""
        try:
            record = json.loads((self.folder / record_name).read_text())
            return record if self.path(record).is_file() and isinstance(record["sha256"], str) else None
        except (OSError, ValueError, KeyError, TypeError):
            return None

    def path(self, record: Mapping[str, Any]) -> Path:
        """Return the path of the shard that a record describes."""
        return self.folder / str(record["file"]).removeprefix(self.prefix)

    def is_intact(self, record: Mapping[str, Any]) -> bool:
        """Whether a shard's file has the checksum of its record; reads the whole file."""
        try:
            return file_digest(self.path(record)) == record["sha256"]
        except OSError:
            return False

    def has_size(self, record: Mapping[str, Any]) -> bool:
        """Whether a shard's file has the size of its record (`bytes`); reads nothing."""
        try:
            return self.path(record).stat().st_size == record["bytes"]
        except (OSError, KeyError):
            return False

    def committed(self) -> list[Record]:
        """Return the records of all intact shards, ordered by record name; a damaged or lost shard is left out."""
        names = sorted(p.name for p in self.folder.glob("*.json") if not p.name.startswith("."))
        records = [r for name in names if (r := self.record(name)) is not None]
        return [r for r in records if self.is_intact(r)]

    def remove_abandoned(self, *, older_than: float = 0.0) -> None:
        """Remove temporary files that killed processes left.

        Args:
            older_than: Spare files that were changed in the last so many seconds. Needed where other jobs may write to
                the folder at the same time; 0 is right under a stage's lock.
        """
        for tmp in self.folder.glob(f".*{TMP}"):
            try:
                if not older_than or time.time() - tmp.stat().st_mtime > older_than:
                    tmp.unlink()
            except FileNotFoundError:
                continue
