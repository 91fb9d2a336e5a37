"""scLDM: the model, and what it made. `scldm.open_cells(folder)` opens generated cells as one lazy object."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from scldm.cells import open_cells

__all__ = ["open_cells"]


def __getattr__(name: str) -> Any:
    if name == "open_cells":  # on demand: anndata and pandas take a second to load
        from scldm.cells import open_cells

        return open_cells
    raise AttributeError(f"module 'scldm' has no attribute {name!r}")
