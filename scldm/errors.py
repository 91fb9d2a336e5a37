"""Errors that the user can fix."""

from __future__ import annotations


class InputError(Exception):
    """Raised for bad input from the user.

    The message says what is wrong, where, why and how to fix it. The command line prints it and exits with 2.
    """


class CheckpointError(InputError, ValueError):
    """Raised for a model folder that cannot be used. The message says what is wrong and what was expected."""
