"""Every path of the package that touches a device, in groups. A path is a function without arguments that asserts.

A group is a function (folder) -> {name of the path: path}; folders are for its files.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

Paths = dict[str, Callable[[], None]]
Group = Callable[[Path], Paths]


def groups() -> dict[str, Group]:
    """Return all groups by name, in the order in which they are run."""
    from helpers.pretended.paths import flows, jobs, loops, notebook, vaes

    return {
        "vae": vaes.paths, "flow": flows.paths, "loop": loops.paths, "job": jobs.paths, "notebook": notebook.paths,
    }  # fmt: skip
