"""Ray's folder for sessions: its sockets lie there, and the path of a socket has at most 107 characters."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

from scldm.errors import InputError

# ray/session_2026-11-29_23-17-05_123456_1234567/sockets/plasma_store
LONGEST = 107 - len("/ray/session_0000-00-00_00-00-00_000000_0000000/sockets/plasma_store")
SHORT = Path("/tmp")


def short_temp_folder(environment: os._Environ[str] | dict[str, str] = os.environ) -> str | None:
    """Return a folder for Ray if its own choice would be too long; None if Ray may choose.

    Raises:
        InputError: RAY_TMPDIR is too long, or TMPDIR is and there is no short folder to use instead.
    """
    if given := environment.get("RAY_TMPDIR"):
        if len(given) > LONGEST:
            raise InputError(
                f"RAY_TMPDIR={given} has {len(given)} characters, and Ray's sockets allow {LONGEST}; set it to a "
                "shorter folder"
            )
        return None
    usual = environment.get("TMPDIR") or tempfile.gettempdir()
    if len(usual) <= LONGEST:
        return None
    short = SHORT / f"ray-{os.getuid()}"
    try:
        short.mkdir(mode=0o700, exist_ok=True)
        if not os.access(short, os.W_OK | os.X_OK):
            raise PermissionError(f"{short} belongs to somebody else")
    except OSError as error:
        raise InputError(
            f"TMPDIR={usual} has {len(usual)} characters, and Ray's sockets allow {LONGEST}; {short} cannot be used "
            f"instead ({error}): set RAY_TMPDIR to a short folder"
        ) from error
    return str(short)
