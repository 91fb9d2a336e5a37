"""Names in job files that have changed: the old one is accepted for one version, with a warning that names the new one.

Run folders keep the job that made them, so an old name also has to load when such a file is opened again.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

from pipeline.config.io.yaml import KeyPath, dotted
from scldm.errors import InputError

log = logging.getLogger(__name__)

UNTIL = "0.3"  # the first version that no longer accepts the old names
KINDS = {"line": "pipeline"}
SETTINGS: dict[str, str] = {}
"""Old dotted path below a stage -> new last key, for example `train.feed.lanes` -> `streams`."""


def accept_old_names(data: dict[str, Any], place: Callable[[KeyPath], str]) -> None:
    """Rename old names in a job before it is validated, in place.

    Args:
        data: The job as plain data.
        place: path -> where it was written, `file:line`.

    Raises:
        InputError: A setting is given under both its old and its new name.
    """
    kind = data.get("kind")
    if isinstance(kind, str) and kind in KINDS:
        data["kind"] = KINDS[kind]
        log.warning(
            "%s: kind: %s is now called kind: %s; the old name is accepted until version %s",
            place(("kind",)), kind, data["kind"], UNTIL,
        )  # fmt: skip
    _rename_settings(data, (), place)


def _rename_settings(section: dict[str, Any], path: KeyPath, place: Callable[[KeyPath], str]) -> None:
    for key in list(section):
        here = (*path, key)
        if isinstance(section[key], dict):
            _rename_settings(section[key], here, place)
        new = next((name for old, name in SETTINGS.items() if f".{dotted(here)}".endswith(f".{old}")), None)
        if new is None:
            continue
        renamed = (*path, new)
        if new in section:
            raise InputError(f"{place(here)}: {dotted(here)} is now called {dotted(renamed)}, and both are given")
        section[new] = section.pop(key)
        log.warning(
            "%s: %s is now called %s; the old name is accepted until version %s",
            place(here), dotted(here), dotted(renamed), UNTIL,
        )  # fmt: skip
