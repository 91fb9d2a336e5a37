"""Check arguments of the notebook's functions before anything is computed, and report all problems together.

numpy's scalars are numbers, as Python's own are; a bool and a text are not. A checked value comes back as Python's own
type, so that everything behind sees one kind.
"""

from __future__ import annotations

import math
import numbers
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from scldm.errors import InputError
from scldm.text import did_you_mean

SEEDS = 2**64  # a seed is below


class ArgumentError(InputError, ValueError):
    """Raised for arguments that a function cannot take. The message lists all problems, one per line."""


class Arguments:
    """Collects the problems of a call's arguments.

    Each method returns the checked value as Python's own type. After a problem the value is a placeholder: call
    `raise_problems` before using any.
    """

    def __init__(self) -> None:
        self.problems: list[str] = []

    def seed(self, value: Any, name: str = "seed") -> int:
        """Check a seed: a whole number in 0 .. 2^64 - 1."""
        return self.whole(name, value, least=0, most=SEEDS - 1)

    def whole(self, name: str, value: Any, *, least: int, most: int | None = None) -> int:
        """Check a whole number, of any integer type, or a float without a fraction."""
        found = _plain(value)
        fits = found is not None and math.isfinite(found) and found == math.floor(found)
        if not fits or found < least or (most is not None and found > most):  # type: ignore[operator]
            limit = f"a whole number >= {least}" if most is None else f"a whole number in {least} .. {most}"
            self.problems.append(f"{name} must be {limit}; got {value!r}")
            return least
        return int(found)  # type: ignore[arg-type]

    def number(
        self, name: str, value: Any, *, above: float | None = None, within: tuple[float, float] | None = None,
        or_text: str = "",
    ) -> float:  # fmt: skip
        """Check a finite number.

        Args:
            above: Limit that the number must exceed.
            within: Smallest and largest allowed value.
            or_text: What else the caller allows, for the message.
        """
        found = _plain(value)
        limit = "a number"
        if above is not None:
            limit = f"a number above {above:g}"
        if within is not None:
            limit = f"a number in {within[0]:g} .. {within[1]:g}"
        good = found is not None and math.isfinite(found)
        good = good and (above is None or found > above)  # type: ignore[operator]
        good = good and (within is None or within[0] <= found <= within[1])  # type: ignore[operator]
        if not good:
            self.problems.append(f"{name} must be {or_text}{limit}; got {value!r}")
            return 1.0
        return float(found)  # type: ignore[arg-type]

    def one_of(self, name: str, value: Any, allowed: Sequence[str]) -> None:
        """Check that a value is one of a few texts."""
        if not isinstance(value, str) or value not in allowed:
            hint = did_you_mean(str(value), allowed)
            self.problems.append(
                f"{name} must be {' or '.join(map(repr, allowed))}; got {value!r}" + (f" ({hint})" if hint else "")
            )

    def flag(self, name: str, value: Any) -> bool:
        """Check a bool."""
        if not isinstance(value, (bool, np.bool_)):
            self.problems.append(f"{name} must be True or False; got {value!r}")
        return bool(value)

    def path(self, name: str, value: Any) -> None:
        """Check a text or a Path."""
        if not isinstance(value, (str, Path)):
            self.problems.append(f"{name} must be a path; got {value!r}")

    def device(self, name: str, value: Any) -> Any:
        """Check a device that torch knows and this machine has; "auto" is a GPU if there is one, else the CPU."""
        import torch

        if isinstance(value, str) and value == "auto":
            value = "cuda" if torch.cuda.is_available() else "cpu"
        try:
            device = torch.device(value)
            torch.empty(0, device=device)
        except (RuntimeError, TypeError, AssertionError, NotImplementedError) as error:
            self.problems.append(f"{name}: {value!r} cannot be used here ({str(error).splitlines()[0]})")
            return value
        return device

    def text(self, name: str, value: Any) -> None:
        """Check a text or None."""
        if value is not None and not isinstance(value, str):
            self.problems.append(f"{name} must be a text or None; got {value!r}")

    def anndata(self, name: str, value: Any) -> Any:
        """Check that cells are an AnnData, in memory or backed, or the path of an h5ad file, which is read."""
        import anndata

        if isinstance(value, (str, Path)):
            path = Path(value).expanduser()
            if not path.exists():
                self.problems.append(f"{name}: there is no file {path}")
                return value
            try:
                return anndata.read_h5ad(path)
            except Exception as error:  # of h5py, anndata or the system
                first = (str(error).splitlines() or [type(error).__name__])[0]
                self.problems.append(f"{name}: {path} cannot be read as an h5ad file ({first})")
                return value
        if not isinstance(value, anndata.AnnData):
            self.problems.append(f"{name} must be an AnnData or the path of an h5ad file; got {type(value).__name__}")
        return value

    def raise_problems(self) -> None:
        """Raise ArgumentError with all problems, if there are any."""
        if self.problems:
            raise ArgumentError("\n".join(dict.fromkeys(self.problems)))


def _plain(value: Any) -> int | float | None:
    """Return a number as Python's own type; None if it is none."""
    if isinstance(value, np.ndarray) and value.ndim == 0:
        value = value.item()
    if isinstance(value, (bool, np.bool_)) or not isinstance(value, numbers.Real):
        return None
    return int(value) if isinstance(value, numbers.Integral) else float(value)
