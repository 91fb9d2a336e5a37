"""scLDM: the model in a notebook, and the cells that jobs made.

    import scldm
    model = scldm.train(adata, labels=["cell_type"])    # the stages of `scldm run`, in one call
    model = scldm.load("runs/demo")                     # a pipeline, a stage, or a folder of models
    model.encode(adata)                                 # AnnData with raw counts in, obsm["X_scldm"] out
    model.generate({"cell_type": "B cell"}, n=500)      # AnnData
    scldm.score(cells, real=adata)                      # compared with the real-vs-real floor
    scldm.open_cells("runs/demo/generate/1a2b3c4d5e6f") # cells of a finished job, read on demand

Needs torch and anndata, nothing of the pipeline (`pip install .` in a checkout; `'.[pipeline]'` brings all the rest),
but for `train`; `score` and `open_cells` need an extra each (`'.[score,cells]'`). The distribution is `scldm-census`;
the `scldm` of the package index is upstream's and does not go into the same environment.
"""

from __future__ import annotations

import warnings
from importlib import import_module, metadata
from importlib.metadata import entry_points
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from scldm.errors import DISTRIBUTION

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
        return metadata.version(DISTRIBUTION)
    raise AttributeError(f"module 'scldm' has no attribute {name!r}")


def _train() -> Any:
    """Return the function of the pipeline package, which knows this one and not the other way round."""
    found = list(entry_points(group="scldm.train"))
    if not found or find_spec("ray") is None:  # the wheel holds the pipeline's code, and not what it needs
        raise AttributeError("scldm.train needs the pipeline, which is not installed: pip install '.[pipeline]'")
    return found[0].load()


def upstream_beside() -> str | None:
    """Say that a distribution `scldm`, upstream's or an older one of ours, has put files into our folder; else None.

    One without files here is no problem: an editable installation under our name up to 0.2, or one that Python does not
    import because ours comes first.
    """
    try:
        other = metadata.distribution("scldm")
    except metadata.PackageNotFoundError:
        return None
    if other.read_text("SOURCES.txt") is not None:
        return None  # an egg-info folder of a checkout: this project was called so up to 0.2
    here = Path(__file__).parent
    theirs = [f for f in other.files or () if f.parts[0] == here.name and f.suffix == ".py"]
    if not any(Path(str(other.locate_file(f))).parent == here for f in theirs):
        return None
    ours = any(point.group == "scldm.train" for point in other.entry_points)
    whose = "its name up to 0.2" if ours else "upstream's"
    return (
        f"two distributions share {here}: {DISTRIBUTION} (this project) and scldm {other.version} ({whose}); what "
        f"was installed last has overwritten files of the other. Run pip uninstall scldm {DISTRIBUTION}, and give each "
        "an environment of its own"
    )


# Files of two projects in one folder fail later and elsewhere, so it is said at once; the look takes a millisecond.
if (_problem := upstream_beside()) is not None:
    warnings.warn(_problem, stacklevel=2)


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
