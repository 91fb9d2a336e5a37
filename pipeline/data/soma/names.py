"""Finds the measurement and layer of an experiment: `tiledbsoma.io` lets a user call them anything."""

from __future__ import annotations

from dataclasses import replace

from pipeline.data.soma.store import SomaStore
from scldm.errors import InputError
from scldm.text import choices_hint


def locate_counts(store: SomaStore, *, measurement: str | None, layer: str | None) -> tuple[SomaStore, list[str]]:
    """Return the store with names that it has, and notes on those that were found instead of the usual ones.

    If a name is not given and the experiment lacks the usual one (measurement RNA, layer raw), its only one is taken.

    Args:
        measurement: As the user gave it; None if not given.
        layer: Likewise.

    Raises:
        InputError: a given name is not there, or there are several to choose from; the message lists them.
    """
    notes: list[str] = []
    name = _chosen("measurement", measurement, store.measurement, store.names("ms"), store, notes)
    store = replace(store, measurement=name)
    name = _chosen("layer", layer, store.layer, store.names(f"ms/{name}/X"), store, notes)
    return replace(store, layer=name), notes


def _chosen(what: str, given: str | None, usual: str, names: list[str], store: SomaStore, notes: list[str]) -> str:
    wanted = given or usual
    if wanted in names:
        return wanted
    where = store.uri if what == "measurement" else f"measurement {store.measurement} of {store.uri}"
    if given is None and len(names) == 1:
        notes.append(f"ingest.source.{what}: {names[0]}, the only one of {where}, is read.")
        return names[0]
    raise InputError(
        f"{where} has no {what} {wanted!r} ({choices_hint(wanted, names)}); set ingest.source.{what} to the one with "
        "raw counts"
    )
