"""Lists the places of an `.h5ad` file that hold counts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import h5py
import numpy as np

from pipeline.data.findings import Finding
from pipeline.data.safety.count_matrix import find_matrix
from pipeline.data.safety.h5ad_structure import DAMAGE, layer_name, layer_setting
from pipeline.data.validation.counts import value_faults


def places_with_counts(file: h5py.File) -> list[str]:
    """Return places whose first values are whole numbers, as settings (`layer: raw`)."""
    places = {layer_setting(name): f"layers/{name}" for name in layer_names(file)}
    candidates = {"null": "X", "raw": "raw/X" if "raw/X" in file else "raw.X", **places}
    return [f"layer: {name}" for name, place in candidates.items() if place in file and _whole(file[place], place)]


def other_places(path: Path, layer: str | None) -> list[str]:
    """Return places with counts other than the one that `ingest.source.layer` names."""
    taken = "null" if layer is None else layer if layer == "raw" else layer_setting(layer_name(layer))
    with h5py.File(path) as file:
        return [p for p in places_with_counts(file) if p != f"layer: {taken}"]


def layer_names(file: h5py.File) -> list[str]:
    """Return the names of the layers of a file."""
    return list(map(str, file["layers"])) if isinstance(file.get("layers"), h5py.Group) else []


def _whole(node: Any, place: str) -> bool:
    try:
        matrix = find_matrix(node, place)
        if isinstance(matrix, Finding):
            return False
        values = matrix.node[:50] if matrix.kind == "dense" else matrix.node["data"][:10_000]
        return values.size > 0 and bool(np.any(values)) and not any(bad.any() for _, bad in value_faults(values))
    except DAMAGE:
        return False
