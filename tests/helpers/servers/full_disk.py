"""A disk with little room left, for a soak."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path


class FullDisk:
    """A file system of its own, 95 % of it taken; where mounting is not permitted, a plain folder (share None)."""

    SIZE, TAKEN = 600 << 20, 0.95

    def __init__(self, folder: Path):
        folder.mkdir()
        self.folder, self.share = folder, None  # type: Path, float | None
        command = ["mount", "-t", "tmpfs", "-o", f"size={self.SIZE}", "tmpfs", str(folder)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            print(f"the disk is not full in this run: mounting is not permitted here ({done.stderr.strip()})")
        else:
            self.share = self.TAKEN
            with (folder / "filler").open("wb") as f:
                os.posix_fallocate(f.fileno(), 0, int(self.TAKEN * self.SIZE))

    def close(self) -> None:
        if self.share is not None:
            subprocess.run(["umount", "--lazy", str(self.folder)], check=False)
