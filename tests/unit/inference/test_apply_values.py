"""Real cells moved to values that no cell of the data had, and cells whose own values are read by what they mean."""

from __future__ import annotations

import json

import anndata
import numpy as np
import pytest
from helpers.models.label_values import number, sets, vectors
from helpers.models.small_models import CELL_TYPES, write_flow, write_vae
from helpers.stages.cell_stages import real_cells, run_stage

import scldm
from scldm.errors import InputError

LABELS = (CELL_TYPES, number(unit="uM"), sets(), vectors(zero=["ctrl"]))


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    root = tmp_path_factory.mktemp("values")
    write_vae(root / "vae", *LABELS, genes_seq_len=None)
    write_flow(root / "flow", *LABELS)
    cells = real_cells()
    rng = np.random.default_rng(1)
    cells.obs["dose"] = rng.choice([1.0, 3.0, 10.0], cells.n_obs)
    cells.obs["drugs"] = rng.choice(["B+A", "A+B", "C"], cells.n_obs)
    cells.obs["gene"] = rng.choice(["A", "ctrl"], cells.n_obs)
    cells.write_h5ad(root / "cells.h5ad")
    return root


def perturbed(place, folder, to, **more) -> anndata.AnnData:
    settings = {
        "source": {"type": "h5ad", "path": str(place / "cells.h5ad")},
        "model": {"vae": str(place / "vae"), "flow": str(place / "flow")},
        "to": to, "flow": {"steps": 2}, **more,
    }  # fmt: skip
    return scldm.open_cells(run_stage("perturb", folder, settings)).to_anndata()


def test_cells_are_moved_to_values_that_no_cell_had(place, tmp_path):
    made = perturbed(place, tmp_path / "out", {"dose": 2.5, "drugs": "C+A", "gene": "D"})
    assert set(made.obs["to_dose"]) == {"2.5"}
    assert set(made.obs["to_drugs"]) == {"A+C"}
    notes = json.loads((tmp_path / "out" / "manifest.json").read_text())["facts"]["notes"]
    assert "dose 2.5 uM has no training cells: interpolated between 1 and 3 uM." in notes


def test_a_cell_without_a_label_stays_without_it_beside_more_values(place, tmp_path):
    cells = anndata.read_h5ad(place / "cells.h5ad")
    cells.obs.loc[cells.obs_names[:30], "dose"] = 77.0  # no class of the model
    cells.write_h5ad(tmp_path / "cells.h5ad")
    source, lenient = {"type": "h5ad", "path": str(tmp_path / "cells.h5ad")}, {"unknown_labels": "none"}
    known = perturbed(place, tmp_path / "known", {"gene": "A"}, source=source, **lenient)
    wide = perturbed(place, tmp_path / "wide", {"gene": "A", "drugs": "A+B+C"}, source=source, **lenient)
    back = perturbed(place, tmp_path / "back", {"gene": "A", "drugs": None}, source=source, **lenient)
    assert known.n_obs == wide.n_obs == back.n_obs == cells.n_obs
    assert not np.allclose(wide.obsm["X_scldm"], back.obsm["X_scldm"])


def test_a_set_in_the_cells_is_found_in_any_order(place, tmp_path):
    cells = anndata.read_h5ad(place / "cells.h5ad")
    cells.obs["drugs"] = cells.obs["drugs"].astype(str).replace({"B+A": "A+B"})
    cells.write_h5ad(tmp_path / "cells.h5ad")
    one = perturbed(place, tmp_path / "one", {"dose": "3.0"})
    other = perturbed(
        place, tmp_path / "other", {"dose": 3}, source={"type": "h5ad", "path": str(tmp_path / "cells.h5ad")}
    )
    np.testing.assert_array_equal(one.X.toarray(), other.X.toarray())


def test_what_cannot_be_asked_for_is_refused_before_a_cell_is_read(place, tmp_path):
    with pytest.raises(InputError) as error:
        perturbed(place, tmp_path / "out", {"dose": "high", "drugs": "A+Z", "gene": "Q"})
    assert [line.split(":")[0] for line in str(error.value).splitlines()] == ["to.dose", "to.drugs", "to.gene"]


def test_a_notebook_moves_cells_as_the_job_does_and_warns(place, tmp_path):
    to = {"dose": 2.5, "gene": "D"}
    made = perturbed(place, tmp_path / "out", to)
    model = scldm.load(place / "vae", flow=place / "flow")
    with pytest.warns(UserWarning, match="dose 2.5 uM has no training cells"):
        own = model.perturb(anndata.read_h5ad(place / "cells.h5ad"), to, sampler={"solver": "midpoint", "steps": 2})
    np.testing.assert_array_equal(own.X.toarray(), made.X.toarray())
    assert own.obs["to_dose"].unique().tolist() == ["2.5"]
