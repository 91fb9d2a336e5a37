"""Fetch a model from the Hugging Face hub, by its name, to the cache of `huggingface_hub`.

    hf://org/name, hf://org/name@revision, org/name@revision

A revision is a branch, a tag or a commit; what is fetched is one commit, whose id goes into the provenance of cells.
Files are data: nothing in them is run, and no pickle and no code is fetched. Needs the extra `hub`.
"""

from __future__ import annotations

import hashlib
import json
import re
from pathlib import Path
from typing import Any

from scldm.errors import CheckpointError, extra

SCHEME = "hf://"
HUB_NAME = r"^[\w.-]+/[\w.-]+@[\w./-]+$"
REPOSITORY = r"[\w.-]+/[\w.-]+"
COMMIT = r"[0-9a-f]{40}"
MODEL_FILES = (".json", ".safetensors", ".md")
INDEX, SUMS = "model_index.json", "sha256"  # the list of parts of a published folder; in it, file -> sha256
CHUNK = 1 << 22  # bytes


def is_hub_name(name: str) -> bool:
    """Return whether a text has the form of a name on the hub; one without a revision needs hf://."""
    return name.startswith(SCHEME) or re.match(HUB_NAME, name) is not None


def fetch_from_hub(name: str, *, token: str | bool | None = None) -> Path:
    """Return the folder of the commit that a name stands for; fetched if it is not in the cache.

    Args:
        name: As above.
        token: Of an account that may read the repository; None: the one that `hf auth login` stored, or HF_TOKEN.

    Raises:
        CheckpointError: There is no such repository or revision, it cannot be reached, or a file is damaged.
    """
    repository, _, revision = name.removeprefix(SCHEME).partition("@")
    if not re.fullmatch(REPOSITORY, repository):
        raise CheckpointError(f"{name} names no repository; write hf://ORGANISATION/NAME@REVISION")
    snapshot_download = client().snapshot_download
    patterns = [f"*{ending}" for ending in MODEL_FILES]
    try:
        place = snapshot_download(repository, revision=revision or None, allow_patterns=patterns, token=token)
    except Exception as error:  # of the client library, of its HTTP library, or of the system
        raise CheckpointError(f"{name} cannot be fetched ({reason(error)})") from error
    folder = Path(place)
    check_sums(folder, name, remedy=f"delete {folder} and load it again; if that does not help, it was published so")
    return folder


def commit_of(folder: Path) -> str | None:
    """Return `hf://org/name@commit` of a folder in the hub's cache; None for any other folder.

    The cache has `models--org--name/snapshots/<commit>`; a model's part is a folder in that.
    """
    for place in (folder, folder.parent):
        owner = place.parent.parent.name
        if re.fullmatch(COMMIT, place.name) and place.parent.name == "snapshots" and owner.startswith("models--"):
            return f"{SCHEME}{'/'.join(owner.split('--')[1:3])}@{place.name}"
    return None


def check_sums(folder: Path, name: str, *, remedy: str = "copy it again") -> None:
    """Compare files with the sums that `save_pretrained` wrote into their index, if it did.

    Args:
        name: Of the model, for the message.
        remedy: What the message advises.

    Raises:
        CheckpointError: A file is missing or has another content; all are listed.
    """
    sums = _sums(folder / INDEX)
    problems = []
    for file, expected in sums.items():
        path = folder / file
        if ".." in Path(file).parts or Path(file).is_absolute() or not path.is_file():
            problems.append(f"{file} is missing")
        elif (found := file_sha256(path)) != expected:
            problems.append(f"{file} has sha256 {found[:12]}…, and its index says {expected[:12]}…")
    if problems:
        raise CheckpointError(f"{name} is damaged: {'; '.join(problems)}; {remedy}")


def sums_of(folder: Path) -> dict[str, str]:
    """Return file -> sha256 of all files of a folder to publish, but for cards, which a publisher edits."""
    files = sorted(p for p in folder.rglob("*") if p.is_file() and p.name != "README.md")
    return {p.relative_to(folder).as_posix(): file_sha256(p) for p in files}


def file_sha256(path: Path) -> str:
    """Return the sha256 of a file, read in parts."""
    digest = hashlib.sha256()
    with path.open("rb") as f:
        while part := f.read(CHUNK):
            digest.update(part)
    return digest.hexdigest()


def client() -> Any:
    """Return the client library's API; it reads HF_ENDPOINT, HF_HOME and HF_TOKEN.

    Raises:
        ModuleNotFoundError: It is not installed.
    """
    with extra("hub"):
        from huggingface_hub import HfApi
    return HfApi(library_name="scldm")


def reason(error: Exception) -> str:
    """Return the first line of what a client library says, and what to do about a refusal."""
    line = (str(error).splitlines() or [""])[0][:300]
    status = getattr(getattr(error, "response", None), "status_code", None)
    hint = "; log in with `hf auth login`, or give token=…" if status in (401, 403) else ""
    return f"{type(error).__name__}: {line}{hint}"


def _sums(index: Path) -> dict[str, str]:
    try:
        found = json.loads(index.read_text()).get(SUMS, {})
    except (OSError, ValueError, AttributeError):
        return {}  # a folder that scldm did not publish, or version 0.1
    return {str(k): str(v) for k, v in found.items()} if isinstance(found, dict) else {}
