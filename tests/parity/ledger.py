"""Ledger of one case: recorded values, our values, and entries that were never compared."""

from __future__ import annotations

import math
import traceback
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from parity.case import Case
from parity.tolerance import EXACT, Tolerance

Status = Literal["ok", "FAIL", "known fault", "not understood"]
# Entries of a description that explain others: words, settings, and the index of tensors that `close` goes through.
DESCRIPTION = {"fixture", "set", "section", "config", "tensors", "keys", "n_state", "grad_of", "grad_norm_names"}


@dataclass(frozen=True)
class Row:
    """One recorded quantity compared with ours."""

    case: str
    quantity: str
    error: float | None  # largest absolute difference; None for values that are not numbers
    tolerance: float | None
    status: Status
    note: str = ""

    @property
    def failed(self) -> bool:
        return self.status in ("FAIL", "not understood")

    def as_json(self) -> dict[str, Any]:
        """Return the row for `--json`: infinities and NaN as text, because JSON has no such numbers."""
        row = asdict(self)
        if self.error is not None and not math.isfinite(self.error):
            row["error"] = str(self.error)
        return {**row, "ok": self.status == "ok"}


class Ledger:
    """Rows of a case, and the tensors and facts that have been accounted for."""

    def __init__(self, case: Case):
        self.case = case
        self.rows: list[Row] = []
        self._seen = {key for key in case.tensors if key.startswith(("state/", "in/"))}
        self._seen_facts = set(DESCRIPTION)

    def given(self, key: str) -> Tensor:
        """Return a tensor that was an input of upstream or drawn at random, and that is used as it is."""
        self._seen.add(key)
        return self.case.tensors[key]

    def fact(self, key: str) -> Any:
        """Return a top-level entry of the description; the caller accounts for all of it."""
        self._seen_facts.add(key)
        return self.case.fact(key)

    def tensor(self, key: str, ours: Tensor, tolerance: Tolerance, note: str = "") -> None:
        """Compare with the recorded tensor of that key; a single-precision one also with its double, if recorded."""
        recorded = self.given(key)
        self.value(key, ours, recorded, tolerance.with_rounding(recorded, self.case.tensors.get(f"{key}.f64")), note)

    def value(self, quantity: str, ours: Any, recorded: Any, tolerance: Tolerance, note: str = "") -> None:
        """Compare numbers: tensors, sequences or scalars."""
        ours, recorded = _numbers(ours), _numbers(recorded)
        if ours.shape != recorded.shape:
            self._add(quantity, None, None, "FAIL", f"shape {tuple(ours.shape)}, recorded {tuple(recorded.shape)}")
            return
        error, scale = largest_difference(ours, recorded)
        allowed = tolerance.at(scale)
        self._add(quantity, error, allowed, "ok" if error <= allowed else "FAIL", note)

    def bounded(self, key: str, ours: Tensor, bound: Tensor, note: str = "") -> None:
        """Compare with a recorded tensor whose elements differ in scale: each against its own bound.

        The row shows the element nearest to its bound.
        """
        ours, recorded = _numbers(ours), _numbers(self.given(key))
        if ours.shape != recorded.shape:
            self.value(key, ours, recorded, EXACT)
            return
        difference = (ours - recorded).abs().nan_to_num(nan=math.inf).flatten()
        worst = int((difference / bound.double().flatten()).argmax())
        error, allowed = float(difference[worst]), float(bound.flatten()[worst])
        self._add(key, error, allowed, "ok" if error <= allowed else "FAIL", note)

    def same(self, quantity: str, ours: object, recorded: object, note: str = "") -> None:
        """Compare values that are not numbers: names, orders, decisions."""
        if ours == recorded:
            self._add(quantity, 0.0, EXACT.at(0), "ok", note)
        else:
            self._add(quantity, None, None, "FAIL", f"ours {_short(ours)}, recorded {_short(recorded)}")

    def fault(self, quantity: str, reason: str, ours: str = "") -> None:
        """List a recorded value that is void by upstream's own fault, with our value."""
        if quantity in self.case.tensors:
            self._seen.add(quantity)
        self._add(quantity, None, None, "known fault", reason + (f"; ours: {ours}" if ours else ""))

    def unknown(self, quantity: str, reason: str) -> None:
        """List an entry that this version cannot compare."""
        if quantity in self.case.tensors:
            self._seen.add(quantity)
        self._add(quantity, None, None, "not understood", reason)

    def fail(self, quantity: str, reason: str) -> None:
        self._add(quantity, None, None, "FAIL", reason)

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Run a part of a case: an exception becomes a row, and the other parts still run."""
        try:
            yield
        except Exception as error:
            at = traceback.extract_tb(error.__traceback__)[-1]
            self.fail(
                name.strip("_"), f"stopped by {type(error).__name__}: {error} ({Path(at.filename).name}:{at.lineno})"
            )

    def close(self) -> list[Row]:
        """Return all rows; entries that were not compared, or promised but missing in the file, are added."""
        for key, dtype, shape in self._promised():
            if key not in self.case.tensors:
                self.fail(key, f"{self.case.name}.json lists it; {self.case.name}.safetensors lacks it")
            else:
                tensor = self.case.tensors[key]
                held = [str(tensor.dtype).removeprefix("torch."), list(tensor.shape)]
                if held != [dtype, shape]:
                    self.fail(key, f"{self.case.name}.json says {dtype} {shape}; the file holds {held[0]} {held[1]}")
        for key in sorted(set(self.case.tensors) - self._seen):
            self.unknown(key, "no comparison knows this tensor")
        for key in sorted(set(self.case.facts) - self._seen_facts):
            if not isinstance(self.case.facts[key], str):  # a sentence explains; it records nothing
                self.unknown(f"{self.case.name}.json: {key}", "no comparison knows this entry")
        return self.rows

    def _promised(self) -> list[tuple[str, str, list[int]]]:
        """Return the tensors that the description lists: key, dtype, shape."""
        listed = self.case.facts.get("tensor_shapes", self.case.facts.get("keys", {}))
        self._seen_facts.add("tensor_shapes")
        return [(key, *entry) for key, entry in listed.items()]

    def _add(self, quantity: str, error: float | None, tolerance: float | None, status: Status, note: str) -> None:
        self.rows.append(Row(self.case.name, quantity, error, tolerance, status, note))


def largest_difference(ours: Tensor, recorded: Tensor) -> tuple[float, float]:
    """Return the largest absolute difference, infinite if only one is finite, and the scale of the recorded tensor."""
    finite = torch.isfinite(recorded)
    if not torch.equal(finite, torch.isfinite(ours)):
        return math.inf, 0.0
    if not torch.equal(ours[~finite].nan_to_num(), recorded[~finite].nan_to_num()):
        return math.inf, 0.0  # infinities of other signs
    if not finite.any():
        return 0.0, 0.0
    difference = (ours[finite] - recorded[finite]).abs().max().item()
    return difference, recorded[finite].abs().max().item()


def _numbers(value: Any) -> Tensor:
    if isinstance(value, Tensor):
        return value.detach().to(torch.float64)
    if isinstance(value, Mapping):
        raise TypeError("compare the values of a mapping one by one")
    return torch.as_tensor(value, dtype=torch.float64)


def _short(value: object) -> str:
    text = repr(list(value)) if isinstance(value, Sequence) and not isinstance(value, str) else repr(value)
    return text if len(text) <= 80 else text[:77] + "…"
