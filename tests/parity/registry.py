"""All kinds of cases, and the comparison of a folder of them."""

from __future__ import annotations

import traceback
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

from parity.case import Case, CaseError, case_names, read_case
from parity.kinds import (
    checkpoints,
    dit,
    grid,
    metrics,
    samplers,
    sampling,
    schedules,
    scvi,
    tokenize,
    transport,
    vae,
)
from parity.ledger import Ledger, Row

# A kind is a module with `matches(case)`, `check(case, ledger)` and, if a case refers to other files, `files(case)`.
# Exactly one kind must match a case.
KINDS: dict[str, ModuleType] = {
    "transformer VAE": vae,
    "MLP VAE": scvi,
    "DiT": dit,
    "sampling with a DiT": sampling,
    "transport": transport,
    "samplers": samplers,
    "schedules, optimizer, EMA": schedules,
    "likelihood grid": grid,
    "metrics": metrics,
    "tokenise": tokenize,
    "checkpoints": checkpoints,
}


@dataclass(frozen=True)
class Summary:
    """Numbers of a comparison."""

    cases: int
    quantities: int
    ok: int
    known_faults: int
    failures: int

    def __str__(self) -> str:
        return (
            f"{self.cases} cases, {self.quantities} quantities: {self.ok} ok, "
            f"{self.known_faults} known faults of upstream, {self.failures} failures"
        )


def check_folder(folder: Path) -> Iterator[Row]:
    """Yield the rows of every case in a folder, then of files that belong to none.

    Raises:
        FolderError: The folder does not exist or holds no case.
    """
    claimed: set[Path] = set()
    for name in case_names(folder):
        yield from check_case(folder, name, claimed)
    for path in stray_files(folder, claimed):
        yield Row(str(path), "file", None, None, "not understood", "no case names this file")


def check_case(folder: Path, name: str, claimed: set[Path] | None = None) -> list[Row]:
    """Return the rows of one case. Exceptions become rows too, so that the other cases still run.

    Args:
        folder: Folder of the case.
        name: Name of the case.
        claimed: If given, other files of the folder to which the case refers are added to it.
    """
    try:
        case = read_case(folder, name)
        kind = kind_of(case)
    except CaseError as error:
        return [Row(name, "case", None, None, "not understood", str(error))]
    ledger, module = Ledger(case), KINDS[kind]
    try:
        if claimed is not None and hasattr(module, "files"):
            claimed.update(module.files(case))
        module.check(case, ledger)
    except Exception as error:
        at = traceback.extract_tb(error.__traceback__)[-1]
        ledger.fail(kind, f"stopped by {type(error).__name__}: {error} ({Path(at.filename).name}:{at.lineno})")
    rows = ledger.close()
    return rows or [Row(name, "case", None, None, "not understood", "it records nothing")]


def kind_of(case: Case) -> str:
    """Return the kind of a case, recognised by its contents."""
    kinds = [name for name, module in KINDS.items() if module.matches(case)]
    if len(kinds) != 1:
        found = f"of {len(kinds)} kinds at once: {', '.join(kinds)}" if kinds else "of no known kind"
        raise CaseError(f"{found}; known are {', '.join(KINDS)}")
    return kinds[0]


def nearest_to_failing(rows: list[Row]) -> Row:
    """Return the most critical row of a case: one that failed, else the one nearest to its tolerance."""
    if failed := [row for row in rows if row.failed]:
        return failed[0]
    compared = [row for row in rows if row.status == "ok"] or rows

    def share(row: Row) -> float:
        return row.error / row.tolerance if row.error is not None and row.tolerance else 0.0

    return max(compared, key=share)


def summary(rows: list[Row]) -> Summary:
    count = {status: sum(row.status == status for row in rows) for status in ("ok", "known fault")}
    return Summary(
        cases=len({row.case for row in rows if row.quantity != "file"}),
        quantities=len(rows),
        ok=count["ok"],
        known_faults=count["known fault"],
        failures=sum(row.failed for row in rows),
    )


def stray_files(folder: Path, claimed: set[Path]) -> list[Path]:
    """Return files that are neither half of a case, nor named by one, nor a README, relative to the folder."""
    files = (path for path in sorted(folder.rglob("*")) if path.is_file() and path.suffix != ".md")
    halves = {path for path in folder.iterdir() if path.suffix in (".json", ".safetensors")}
    return [path.relative_to(folder) for path in files if path not in halves and path not in claimed]
