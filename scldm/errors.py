"""The base of every error that the user can put right."""

from __future__ import annotations


class InputError(Exception):
    """Bad input from the user: what, where, why and how to mend it. The command line prints it and exits with 2."""
