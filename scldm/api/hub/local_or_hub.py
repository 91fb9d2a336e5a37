"""Decide whether the name that `Model.from_pretrained` is given is a folder or a repository of the Hugging Face hub.

The hub: a revision is given, the name begins with hf://, or it has the form org/name or org/name@revision and there is
no such folder. Else a folder. A folder `org/name` that holds no model is an error: the repository could be meant.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from scldm.api.arguments import Arguments
from scldm.api.folders import find_models
from scldm.api.hub.download import REPOSITORY, SCHEME, check_sums, fetch_from_hub
from scldm.errors import CheckpointError


def pretrained_folder(name: Any, revision: Any = None, token: Any = None) -> Path:
    """Return the folder of a model, fetched from the hub if it is there.

    Raises:
        CheckpointError: The folder holds no model, or as `fetch_from_hub`.
        ArgumentError: An argument has another type.
    """
    given = Arguments()
    given.path("name", name)
    given.text("revision", revision)
    given.raise_problems()
    text = str(name)
    repository, _, written = text.removeprefix(SCHEME).partition("@")
    could_be_repository = isinstance(name, str) and re.fullmatch(REPOSITORY, repository) is not None
    if revision is not None:
        _require_one_revision(text, written, revision, could_be_repository=could_be_repository)
        return fetch_from_hub(f"{SCHEME}{repository}@{revision}", token=token)
    if text.startswith(SCHEME):
        return fetch_from_hub(text, token=token)
    place = Path(text).expanduser()
    if not could_be_repository:
        check_sums(place, text)
        return place
    if not place.exists():
        return _from_hub(text, place, token)
    try:
        find_models(place)
    except CheckpointError as error:
        raise CheckpointError(f"{error}. If the repository of that name is meant: {SCHEME}{text}") from error
    check_sums(place, text)
    return place


def _require_one_revision(text: str, written: str, revision: str, *, could_be_repository: bool) -> None:
    if not could_be_repository:
        raise CheckpointError(f"a revision belongs to a repository of the hub, 'org/name'; {text!r} is none")
    if written not in ("", revision):
        raise CheckpointError(f"{text} names a revision, and revision={revision!r} another one: leave one out")


def _from_hub(text: str, place: Path, token: Any) -> Path:
    try:
        return fetch_from_hub(f"{SCHEME}{text}", token=token)
    except CheckpointError as error:
        raise CheckpointError(f"there is no folder {place.absolute()}, and {error}") from error
