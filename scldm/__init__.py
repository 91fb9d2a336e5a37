"""scLDM: the model in a notebook, and the cells that jobs made.

    import scldm
    model = scldm.train(adata, labels=["cell_type"])    # the stages of `scldm run`, in one call
    model = scldm.load("runs/demo")                     # a pipeline, a stage, or a folder of models
    model.encode(adata)                                 # AnnData with raw counts in, obsm["X_scldm"] out
    model.generate({"cell_type": "B cell"}, n=500)      # AnnData
    scldm.score(cells, real=adata)                      # compared with the real-vs-real floor
    scldm.open_cells("runs/demo/generate/1a2b3c4d5e6f") # cells of a finished job, read on demand

Needs torch and anndata, nothing of the pipeline (`pip install .` in a checkout; `'.[pipeline]'` brings all the rest),
but for `train`.
"""

from __future__ import annotations

from importlib import import_module
from importlib.metadata import entry_points
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from scldm.api.model import Model, load
    from scldm.api.scoring import score
    from scldm.cells.cells import open_cells

__all__ = ["Model", "load", "open_cells", "score", "train"]

_HOME = {
    "Model": "scldm.api.model",
    "load": "scldm.api.model",
    "open_cells": "scldm.cells.cells",
    "score": "scldm.api.scoring",
}


def __getattr__(name: str) -> Any:
    if name in _HOME:  # on demand: torch and anndata take seconds to load
        return getattr(import_module(_HOME[name]), name)
    if name == "train":
        return _train()
    if name == "__version__":  # pyproject.toml is where it is written
        from importlib.metadata import version

        return version("scldm")
    raise AttributeError(f"module 'scldm' has no attribute {name!r}")


def _train() -> Any:
    """Return the function of the pipeline package, which knows this one and not the other way round."""
    found = list(entry_points(group="scldm.train"))
    if not found:
        raise AttributeError("scldm.train needs the pipeline, which is not installed: pip install '.[pipeline]'")
    return found[0].load()


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
