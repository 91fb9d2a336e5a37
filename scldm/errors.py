"""Errors that the user can fix: bad input, and a library that is not installed."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

DISTRIBUTION = "scldm-census"  # what pip installs; the import is scldm
EXTRAS = {  # of the model alone, each with what needs it
    "cells": "cells of a finished job (scldm.open_cells)",
    "hub": "models of the Hugging Face hub",
    "plot": "Model.plot_umap",
    "score": "scldm.score, Model.map and the metrics",
    "upstream": "checkpoints of upstream",
}


class InputError(Exception):
    """Raised for bad input from the user.

    The message says what is wrong, where, why and how to fix it. The command line prints it and exits with 2.
    """


class CheckpointError(InputError, ValueError):
    """Raised for a model folder that cannot be used. The message says what is wrong and what was expected."""


@contextmanager
def extra(name: str) -> Iterator[None]:
    """Say which extra brings a library, where an import in this block finds none.

    Raises:
        ModuleNotFoundError: A library is not installed; the message says what needs it and what installs it.
    """
    try:
        yield
    except ModuleNotFoundError as error:
        if error.name is None or error.name.partition(".")[0] in ("scldm", "pipeline"):
            raise
        raise ModuleNotFoundError(
            f"{EXTRAS[name]}: {error.name} is not installed, which the model alone leaves out: pip install "
            f"'{DISTRIBUTION}[{name}]' (in a checkout of this project pip install '.[{name}]')",
            name=error.name,
        ) from error
