"""Downloads the files that upstream publishes in an open S3 bucket, and keeps a record of what they were.

A download that was interrupted goes on where it stopped, if the object is still the same one. A file is checked against
the MD5 sum that S3 states (of objects that were not uploaded in parts) and against the SHA-256 sum that was recorded
when it was first downloaded; then it gets its name. Nothing in a file is opened here.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.config.s3 import S3Client
from pipeline.core.files import write_json_atomic
from scldm.errors import InputError

BUCKET = "czi-scldm"
REGION = "us-west-2"
GROUPS = ("datasets", "vae_census", "fm_observational", "fm_perturbation", "resubmission")  # folders of the bucket
RECORD = "downloads.json"
PIECE = 1 << 22  # bytes


@dataclass(frozen=True)
class Published:
    """A file in the bucket."""

    key: str  # group/name
    size: int  # bytes


@dataclass(frozen=True)
class PublishedFiles:
    """The bucket. Errors of the store are raised as InputError.

    Args:
        client: Where the store is, and how often a request is tried.
    """

    client: S3Client
    region: str = REGION
    bucket: str = BUCKET

    def list(self, groups: Sequence[str]) -> list[Published]:
        """Return the files of some groups.

        Raises:
            InputError: A group is not known or holds nothing, or the bucket cannot be reached.
        """
        if unknown := [g for g in groups if g not in GROUPS]:
            raise InputError(f"no group {', '.join(unknown)}; upstream publishes {', '.join(GROUPS)}")
        found = [f for group in groups for f in self._of_group(group)]
        if empty := [g for g in groups if not any(f.key.startswith(f"{g}/") for f in found)]:
            raise InputError(f"s3://{self.bucket} holds nothing in {', '.join(empty)}: upstream has moved its files")
        return found

    def download(self, file: Published, folder: Path, progress: Callable[[int], None]) -> bool:
        """Download a file to `folder/<key>`; return whether anything had to be read.

        Args:
            progress: Called with the number of bytes that are there more; first with those of an earlier download.

        Raises:
            InputError: The content is not what the store states, or what was recorded before.
        """
        path = folder / file.key
        record = _read_record(folder)
        if path.is_file() and path.stat().st_size == file.size:
            _check(path, _sha256(path), record.get(file.key))
            progress(file.size)
            return False
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_name(f"{path.name}.part")
        with _as_input_errors(self, file.key):
            etag = self._read_rest(file, part, progress)
        if (size := part.stat().st_size) != file.size:
            raise InputError(
                f"{file.key} ended after {size:,} of {file.size:,} bytes; run the same command again, and it goes on "
                "where it stopped"
            )
        sha256 = _sha256(part)
        if re.fullmatch(r"[0-9a-f]{32}", etag) and (md5 := _digest(part, "md5")) != etag:
            part.unlink()
            raise InputError(f"{file.key} has MD5 {md5}, and the store states {etag}; run the command again")
        _check(part, sha256, record.get(file.key))
        part.rename(path)
        _part_record(part).unlink(missing_ok=True)
        write_json_atomic(folder / RECORD, {**_read_record(folder), file.key: {"sha256": sha256, "size": file.size}})
        return True

    def _of_group(self, group: str) -> Iterator[Published]:
        from pyarrow import fs

        with _as_input_errors(self, group):
            selector = fs.FileSelector(f"{self.bucket}/{group}", recursive=True, allow_not_found=True)
            for info in sorted(self._store().get_file_info(selector), key=lambda i: i.path):
                if info.is_file and ".." not in Path(info.path).parts:
                    yield Published(info.path.removeprefix(f"{self.bucket}/"), info.size)

    def _read_rest(self, file: Published, part: Path, progress: Callable[[int], None]) -> str:
        """Append what is missing to a partial file; return the object's ETag."""
        store, place = self._store(), f"{self.bucket}/{file.key}"
        with store.open_input_stream(place) as stream:
            etag = stream.metadata().get("ETag", b"").decode().strip('"')
        known = _part_record(part)
        if not (part.is_file() and known.is_file() and known.read_text() == etag and part.stat().st_size <= file.size):
            part.unlink(missing_ok=True)
            known.write_text(etag)
        with store.open_input_file(place) as source, part.open("ab") as out:
            source.seek(out.tell())
            if there := out.tell():
                progress(there)
            while piece := source.read(PIECE):
                out.write(piece)
                progress(len(piece))
        return etag

    def _store(self) -> Any:
        return self.client.filesystem(region=self.region, anonymous=True)


@contextmanager
def _as_input_errors(files: PublishedFiles, key: str) -> Iterator[None]:
    """Raise errors of the store as one InputError that names the object."""
    try:
        yield
    except OSError as error:
        line = (str(error).splitlines() or [""])[0][:300]
        raise InputError(
            f"s3://{files.bucket}/{key} cannot be read ({line}); run the same command again, and it goes on where it "
            "stopped"
        ) from error


def _part_record(part: Path) -> Path:
    return part.with_name(f"{part.name}.etag")


def _read_record(folder: Path) -> dict[str, Any]:
    path = folder / RECORD
    if not path.is_file():
        return {}
    try:
        found: dict[str, Any] = json.loads(path.read_text())
        return found
    except ValueError as error:
        raise InputError(f"{path} is damaged ({error}); delete it, and sums are recorded again") from error


def _check(path: Path, sha256: str, recorded: dict[str, Any] | None) -> None:
    if recorded is not None and recorded.get("sha256") != sha256:
        raise InputError(
            f"{path} has another content than when it was first downloaded (SHA-256 {sha256[:12]}…, recorded "
            f"{str(recorded.get('sha256'))[:12]}…): upstream replaced it, or the copy is damaged; delete it and its "
            f"line in {RECORD} to take the new one"
        )


def _sha256(path: Path) -> str:
    return _digest(path, "sha256")


def _digest(path: Path, name: str) -> str:
    with path.open("rb") as f:
        return hashlib.file_digest(f, name).hexdigest()
