"""Arithmetic on whole numbers."""

from __future__ import annotations


def ceil_div(a: int, b: int) -> int:
    """Return a / b rounded up, exact for integers of any size, unlike `math.ceil(a / b)`."""
    return -(-a // b)
