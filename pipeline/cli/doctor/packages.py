"""The check of `scldm doctor` that the files of `import scldm` are ours: upstream's package has the same name."""

from __future__ import annotations

import hashlib
from base64 import urlsafe_b64encode
from importlib import metadata
from pathlib import Path

from pipeline.cli.doctor.finding import Finding, Requirements
from scldm.errors import DISTRIBUTION

FIX = f"pip uninstall {DISTRIBUTION} scldm, then install this project again"


def packages(requirements: Requirements) -> Finding:
    """Look for upstream's distribution in our folder, and for files of ours that were changed since installation."""
    from scldm import upstream_beside

    if problem := upstream_beside():
        return Finding("packages", "fail", problem.partition(". ")[0], FIX)
    if changed := changed_files():
        some = ", ".join(changed[:3]) + (", …" if len(changed) > 3 else "")
        return Finding(
            "packages", "fail", f"{len(changed)} files are not as {DISTRIBUTION} installed them: {some}", FIX
        )
    return Finding("packages", "ok", f"`import scldm` is {DISTRIBUTION}, and no file of another package lies over it")


def changed_files() -> list[str]:
    """Return the files of our distribution that are not as installed; none in an editable installation."""
    try:
        own = metadata.distribution(DISTRIBUTION)
    except metadata.PackageNotFoundError:
        return []
    changed = []
    for file in own.files or ():
        if file.suffix != ".py" or file.hash is None or file.parts[0] not in ("scldm", "pipeline"):
            continue
        place = Path(str(own.locate_file(file)))
        digest = hashlib.new(file.hash.mode, place.read_bytes()).digest() if place.is_file() else b""
        if urlsafe_b64encode(digest).decode().rstrip("=") != file.hash.value:
            changed.append(str(file))
    return changed
