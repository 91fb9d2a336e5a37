"""Paths of the notebook API with device="cuda"; numbers of real cells are compared with those of the CPU."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any, get_args

import anndata
import numpy as np

import scldm
from helpers.models.label_values import number, vectors
from helpers.models.small_models import CELL_TYPES, DONORS, write_flow, write_vae
from helpers.pretended.paths import Paths
from helpers.stages.cell_stages import real_cells
from scldm.api.model import Model
from scldm.flow.config import ControlStart, Distilled, Solver

REQUEST = {"cell_type": "B", "donor": "d1"}
TABLE = [{**REQUEST, "n_cells": 3, "guidance": 2.0}, {"cell_type": "T", "n_cells": 3}]
PER_LABEL = {"cell_type": 1.5, "donor": 2.0}


def paths(root: Path) -> Paths:
    labels, start = (CELL_TYPES, DONORS), ControlStart(label="donor", control="d1", share=0.5)
    write_vae(root / "vae", *labels, genes_seq_len=None)
    write_flow(root / "flow", *labels)
    write_flow(root / "exclusive", *labels, strategy="mutually_exclusive")
    write_flow(root / "controls", *labels, start=start)
    write_flow(root / "distilled", *labels, distilled=Distilled(evaluations=2, guidance=1.0, teacher="t"))
    values = (CELL_TYPES, number(), vectors())
    write_vae(root / "vae of values", *values, genes_seq_len=None)
    write_flow(root / "values", *values)

    def on(what: Callable[[Model], Any], flow: str = "flow", vae: str = "vae") -> Callable[[], None]:
        def path() -> None:
            model = scldm.load(root / vae, flow=root / flow, device="cuda")
            assert model.device.type == "cuda"
            _finite(what(model))

        return path

    found: Paths = {
        "encode": lambda: _alike(root, lambda m: m.encode(real_cells()).obsm["X_scldm"]),
        "reconstruct": lambda: _alike(root, lambda m: m.reconstruct(real_cells(), mean=True).layers["mean"]),
        "log_likelihood": lambda: _alike(root, lambda m: m.log_likelihood(real_cells()).to_numpy()),
        "log_likelihood of the flow": lambda: _alike(
            root, lambda m: m.log_likelihood(real_cells(), flow=True, probes=2).to_numpy()
        ),
        "normalized_expression": lambda: _alike(root, lambda m: m.normalized_expression(real_cells()).X),
        "transform": on(lambda m: m.transform(real_cells(), {"donor": "d1"})),
        "interpolate between cells": on(lambda m: m.interpolate(real_cells()[:3], real_cells()[3:6], n=3)),
        "interpolate between conditions": on(lambda m: m.interpolate({"cell_type": "B"}, {"cell_type": "T"}, n=3)),
        "differential_expression": lambda: _alike(
            root,
            lambda m: (
                m.differential_expression(real_cells(), "donor", "d1", n_permutations=99)
                .sort_index()[["mean1", "mean2", "p_value"]]
                .to_numpy()
            ),
        ),
        "differential_expression of generated cells": lambda: _alike(
            root,
            lambda m: (
                m.differential_expression(real_cells(), "donor", "d1", method="generated", n=5)
                .sort_index()[["mean1", "mean2"]]
                .to_numpy()
            ),
        ),
        "perturb": on(lambda m: m.perturb(real_cells(), {"cell_type": "NK"})),
        "perturb by changed counts": on(lambda m: m.perturb(real_cells(), {"cell_type": "NK"}, counts="changed")),
        "perturb from noise": on(lambda m: m.perturb(real_cells(), {"cell_type": "NK"}, start="noise")),
        "perturb from control cells": on(
            lambda m: m.perturb(_controls(), {"donor": "d_2"}, start="control"), flow="controls"
        ),
        "generate": lambda: _alike(root, lambda m: m.generate(REQUEST, n=5, seed=1).obsm["X_scldm"]),
        "generate without labels": on(lambda m: m.generate(None, n=5)),
        "generate, guidance of each row": on(lambda m: m.generate(TABLE)),
        "generate, guidance of each label": on(
            lambda m: m.generate(REQUEST, n=5, guidance=PER_LABEL), flow="exclusive"
        ),
        "generate by way of control cells": on(lambda m: m.generate(TABLE, start="control"), flow="controls"),
        "generate, distilled": on(lambda m: m.generate(REQUEST, n=5), flow="distilled"),
        "generate, values as labels": on(
            lambda m: m.generate({"cell_type": "B", "dose": "3", "gene": "A"}, n=5), flow="values", vae="vae of values"
        ),
        "generate, one library size, some genes": on(
            lambda m: m.generate(REQUEST, n=5, library_size=100.0, genes=["g1", "g3"])
        ),
    }
    for solver in get_args(Solver):
        sampler = {"solver": solver, "steps": 3, "rtol": 1e-2, "atol": 1e-2}
        found[f"generate by {solver}"] = on(
            lambda m, sampler=sampler: m.generate(REQUEST, n=3, guidance=2.0, sampler=sampler)
        )
    return found


def _controls() -> anndata.AnnData:
    cells = real_cells()
    return cells[(cells.obs["donor"] == "d1").to_numpy()].copy()


@cache
def _model(root: Path, device: str) -> Model:
    return scldm.load(root / "vae", flow=root / "flow", device=device, precision="fp32")  # bf16 is the default of a GPU


def _alike(root: Path, numbers: Callable[[Model], np.ndarray]) -> None:
    """Compare what the device and the CPU make of the same cells."""
    found, expected = numbers(_model(root, "cuda")), numbers(_model(root, "cpu"))
    np.testing.assert_allclose(np.asarray(found), np.asarray(expected), rtol=2e-3, atol=2e-3)


def _finite(made: Any) -> None:
    assert made.n_obs > 0
    assert np.isfinite(made.obsm["X_scldm"]).all()
    assert np.isfinite(made.X.data).all()
