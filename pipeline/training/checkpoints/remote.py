"""Remote storage of a run's checkpoints: a folder, an NFS path, or s3://bucket/prefix.

The rule is that of local checkpoints: the manifest is written last and removed first, so a checkpoint exists if and
only if its manifest does. A downloaded checkpoint is verified like every other before it is loaded.
"""

from __future__ import annotations

import shutil
import uuid
from pathlib import Path
from typing import Any

from pipeline.config.resources import CheckpointStorage
from pipeline.core.faults import fault_point
from pipeline.training.checkpoints.manifest import MANIFEST, CheckpointInfo, read
from scldm.errors import InputError

CHUNK = 16 << 20


class Remote:
    """The checkpoints of one run in remote storage. All methods raise OSError if the storage does not answer.

    Args:
        run: The run's folder under `config.storage_path`: <name>/<stage>/<version>.
    """

    def __init__(self, config: CheckpointStorage, run: str):
        assert config.storage_path is not None
        self.address = f"{config.storage_path.rstrip('/')}/{run}"
        self.atomic = config.storage_path.startswith("s3://")  # an object appears whole or not at all
        self._fs, self._root = _open(config, self.address)

    def put(self, folder: Path) -> None:
        """Upload a committed checkpoint, its manifest last."""
        files = sorted(p for p in folder.rglob("*") if p.is_file() and p.name != MANIFEST)
        for path in [*files, folder / MANIFEST]:
            fault_point("upload.before_file")
            self._put(path, f"{self._root}/{folder.name}/{path.relative_to(folder)}")
            fault_point("upload.after_file")

    def get(self, name: str, root: Path) -> Path:
        """Download a checkpoint into `root`, its manifest last. Return its folder."""
        from pyarrow.fs import FileSelector, FileType

        folder = root / name
        shutil.rmtree(folder, ignore_errors=True)
        base = f"{self._root}/{name}"
        found = self._fs.get_file_info(FileSelector(base, recursive=True))
        paths = sorted((f.path for f in found if f.type == FileType.File), key=lambda p: p.endswith(MANIFEST))
        for path in paths:
            target = folder / path[len(base) + 1 :]
            target.parent.mkdir(parents=True, exist_ok=True)
            part = target.with_name(f".{target.name}.part")
            with self._fs.open_input_stream(path) as source, part.open("wb") as f:
                shutil.copyfileobj(source, f, CHUNK)
            fault_point("download.before_rename")
            part.replace(target)
        return folder

    def names(self) -> list[str]:
        """Return the names of committed checkpoints, newest first."""
        return [name for name, committed in self._folders() if committed]

    def unfinished(self) -> list[str]:
        """Return the folders without a manifest: uploads, or removals, that a kill interrupted."""
        return [name for name, committed in self._folders() if not committed]

    def _folders(self) -> list[tuple[str, bool]]:
        """Return each folder's name and whether it has a manifest, newest first."""
        from pyarrow.fs import FileSelector, FileType

        found = self._fs.get_file_info(FileSelector(self._root, allow_not_found=True))
        names = [f.base_name for f in found if f.type == FileType.Directory and f.base_name.startswith("step-")]
        infos = self._fs.get_file_info([f"{self._root}/{n}/{MANIFEST}" for n in names]) if names else []
        return sorted(((n, i.type == FileType.File) for n, i in zip(names, infos, strict=True)), reverse=True)

    def manifest(self, name: str, scratch: Path) -> CheckpointInfo:
        """Read the manifest of a checkpoint, downloaded into `scratch`. Raises ValueError if it is damaged."""
        folder = scratch / name
        folder.mkdir(parents=True, exist_ok=True)
        with self._fs.open_input_stream(f"{self._root}/{name}/{MANIFEST}") as source:
            (folder / MANIFEST).write_bytes(source.read())
        return read(folder)

    def remove(self, name: str) -> None:
        """Remove a checkpoint, its manifest first."""
        self._fs.delete_file(f"{self._root}/{name}/{MANIFEST}")
        fault_point("upload.in_remove")
        self.remove_unfinished(name)

    def remove_unfinished(self, name: str) -> None:
        """Remove a folder that has no manifest."""
        self._fs.delete_dir(f"{self._root}/{name}")

    def probe(self) -> None:
        """Write and remove a small file, to check that the storage can be written."""
        name = f"{self._root}/.probe-{uuid.uuid4().hex[:8]}"
        self._parent(name)
        with self._fs.open_output_stream(name) as f:
            f.write(b"scldm")
        self._fs.delete_file(name)

    def _put(self, path: Path, target: str) -> None:
        self._parent(target)
        written = target if self.atomic else f"{target}.part"
        with path.open("rb") as source, self._fs.open_output_stream(written) as f:
            shutil.copyfileobj(source, f, CHUNK)
        if written != target:
            fault_point("upload.before_rename")
            self._fs.move(written, target)

    def _parent(self, target: str) -> None:
        if not self.atomic:
            self._fs.create_dir(target.rpartition("/")[0], recursive=True)


def _open(config: CheckpointStorage, address: str) -> tuple[Any, str]:
    """Return the file system and the path of an address."""
    from pyarrow import fs

    if "://" not in address:
        return fs.LocalFileSystem(), str(Path(address).expanduser().absolute())
    if not address.startswith("s3://"):
        raise InputError(
            f"checkpoints.storage_path ({config.storage_path}) must be a folder or s3://bucket/prefix; mount other "
            "stores as folders"
        )
    return config.s3.filesystem(region=config.region), address.removeprefix("s3://")


def check_storage(config: CheckpointStorage, run: str) -> None:
    """Raise an InputError if checkpoints cannot be uploaded, before anything is computed."""
    if config.storage_path is None:
        return
    try:
        Remote(config, run).probe()
    except OSError as error:
        raise InputError(
            f"checkpoints.storage_path ({config.storage_path}) cannot be written: {str(error).splitlines()[0]}; check "
            "the path, its permissions, checkpoints.region and checkpoints.s3, or set it to null"
        ) from error
