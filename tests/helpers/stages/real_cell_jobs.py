"""Jobs on real cells at toy size: the four kinds, their settings, and what they made."""

from __future__ import annotations

import numpy as np
import pandas as pd

import scldm
from helpers.stages.cell_stages import here, models, run_stage, write_soma

ALL = {
    "embed": {},
    "reconstruct": {"decode": "both"},
    "perturb": {"to": {"cell_type": "NK"}, "flow": {"steps": 4}},
    "log_likelihood": {"flow": {"steps": 4, "probes": 2}},
}
USES_FLOW = ("perturb", "log_likelihood")


def cells_and_models(root):
    """(folder, source, model folders), for the tests of a file to share."""
    return root, write_soma(root / "soma"), models(root)


def settings(place, stage, **more):
    _, source, folders = place
    model = folders if stage in USES_FLOW else {"vae": folders["vae"]}
    return {"source": source, "model": model, "shard_size": 40, **ALL[stage], **more}


def made(place, tmp_path, stage, *, pool=here, name="out", seed=0, **more):
    folder = run_stage(stage, tmp_path / name, settings(place, stage, **more), pool=pool, seed=seed)
    return scldm.open_cells(folder).to_anndata()


def equal(a, b):
    pd.testing.assert_frame_equal(a.obs, b.obs, check_exact=True)
    if a.X is not None:
        assert (a.X != b.X).nnz == 0
    for kind in ("obsm", "layers"):
        assert set(getattr(a, kind)) == set(getattr(b, kind))
        for key, values in getattr(a, kind).items():
            np.testing.assert_array_equal(values, getattr(b, kind)[key])
