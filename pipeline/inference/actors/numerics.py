"""Makes all shards of a stage in one precision and on one kind of device, whoever resumes it and where.

A setting `precision` that is set is part of a stage's version. Left out, it is decided by the first actor, by its
device, and written next to the shards before any is made; other actors follow it. Records of shards say it too, and a
later attempt goes on with what they say. An actor that cannot, because its device is of another kind or lacks the
precision, is refused: cells of one stage never differ in it without a word.
"""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from scldm.errors import InputError
from scldm.nn.kernels.precision import Numerics, Precision, PrecisionError, resolve

if TYPE_CHECKING:
    import torch

MARK = ".precision.json"  # hidden: records of shards are the other .json files


def begin(folder: Path, records: Sequence[Mapping[str, Any]], *, gpus: float) -> None:
    """Tell the actors of this attempt in what earlier ones made their shards; without any, the first actor decides.

    The caller holds the stage's lock. Shards of versions that knew no precision are fp32; which device they are of is
    not known.

    Args:
        folder: Of the shards.
        records: Of the shards that are committed.
        gpus: Of an actor.

    Raises:
        InputError: They were made on GPUs, and the job asks for none.
    """
    path = folder / MARK
    path.unlink(missing_ok=True)
    if not records:
        return
    decided = _decide(path, _made_in(records) or {"precision": "fp32", "device": None})
    if not gpus and decided["device"] == "cuda":
        raise InputError(_other_device(folder, decided, "a CPU") + ", or set resources.gpus_per_worker=1")


def agree(
    folder: Path, wanted: Precision | None, device: torch.device, *, where: str, solver: str | None = None
) -> Numerics:
    """Return the precision in which an actor makes the shards of a folder; the first one decides.

    Args:
        folder: Of the shards.
        wanted: As set; None: as decided before, else by device.
        device: Of the actor.
        where: Name of the setting, for messages.
        solver: Of the flow, if one is integrated.

    Raises:
        InputError: The device has no such precision, or shards were begun in another or on another kind of device.
    """
    path = folder / MARK
    decided = _read(path)
    if decided is None:
        own = Numerics(resolve(wanted, device, where=where, solver=solver), device.type)
        decided = _decide(path, own.as_plain())
    if decided["device"] not in (None, device.type):
        raise InputError(_other_device(folder, decided, "a GPU" if device.type == "cuda" else "a CPU"))
    begun: Precision = decided["precision"]
    if wanted not in (None, begun):
        raise InputError(
            f"{where} ({wanted}): shards in {folder} were begun in {begun}, and one stage has one precision; delete "
            f"that folder to make all of them in {wanted}"
        )
    try:
        return Numerics(resolve(begun, device, where=where), device.type)
    except PrecisionError as error:
        raise InputError(
            f"{where}: shards in {folder} were begun in {begun}, which this device lacks ({error}); run the job where "
            "it began, or delete that folder to make all of them here"
        ) from error


def end(folder: Path, records: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    """Return the precision and the kind of device of all shards, for the manifest; nothing if no network made them.

    Args:
        folder: Of the shards; what the actors agreed on is removed from it.
        records: Of all shards.

    Raises:
        RuntimeError: They differ.
    """
    found = _made_in(records)
    (folder / MARK).unlink(missing_ok=True)
    return found


def _made_in(records: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    # Shards of versions that knew no precision are fp32, on the device of the others: `agree` saw to it.
    found = {(r["precision"], r["device"]) for r in records if "precision" in r}
    if len(found) > 1:
        told = " and ".join(f"{precision} on {device}" for precision, device in sorted(found))
        raise RuntimeError(f"shards of one stage were made in {told}; delete them and run again")
    return {} if not found else dict(zip(("precision", "device"), *found, strict=True))


def _other_device(folder: Path, decided: Mapping[str, Any], here: str) -> str:
    there = "GPUs" if decided["device"] == "cuda" else "CPUs"
    return (
        f"shards in {folder} were begun on {there} ({decided['precision']}), and cells made on {here} would differ in "
        "rounding; run the job where it began, or delete that folder to make all of them here"
    )


def _read(path: Path) -> dict[str, Any] | None:
    """Return the decision; None if there is none. An actor may be writing it just now."""
    for _ in range(50):
        try:
            found: dict[str, Any] = json.loads(path.read_text())
        except FileNotFoundError:
            return None
        except ValueError:
            time.sleep(0.1)
        else:
            return found
    raise InputError(f"{path} is damaged; delete the folder {path.parent} and run again")


def _decide(path: Path, decided: Mapping[str, Any]) -> dict[str, Any]:
    """Write a decision unless another actor was sooner; return the one that holds."""
    with contextlib.suppress(FileExistsError), path.open("x") as out:
        out.write(json.dumps(decided))
    found = _read(path)
    assert found is not None
    return found
