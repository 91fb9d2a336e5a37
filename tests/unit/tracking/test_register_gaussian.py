"""A registered model with a Gaussian head returns log1p CP10k values, and says so in its signature and metadata."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
from helpers.models.small_models import write_flow, write_vae

import scldm
from pipeline.tracking.mlflow_runs.register import save
from scldm.api.folders import ModelFolders

ROWS = [{"cell_type": "T", "n_cells": 3}, {"cell_type": "NK", "n_cells": 2}]


@pytest.mark.parametrize(
    ("head", "scale", "dtype"), [("gaussian", "log1p_cp10k", "float32"), ("nb_cell", "counts", "int32")]
)
def test_what_a_registered_model_returns_is_in_its_metadata(tmp_path, head, scale, dtype):
    import mlflow

    models = ModelFolders(write_vae(tmp_path / "vae", head=head), write_flow(tmp_path / "flow"))
    save(models, tmp_path / "saved" / "model")
    model = mlflow.pyfunc.load_model(str(tmp_path / "saved" / "model"))
    assert model.metadata.metadata["scldm.scale"] == scale
    (cells,) = model.metadata.signature.outputs.inputs
    assert (cells.type, cells.shape) == (np.dtype(dtype), (-1, 6))
    values = model.predict(pd.DataFrame(ROWS), params={"seed": 7})
    assert set(values.dtypes) == {np.dtype(dtype)}
    expected = scldm.load(models.vae, flow=models.flow).generate(ROWS, seed=7)
    np.testing.assert_array_equal(values.to_numpy(), expected.X.toarray())
    if head == "gaussian":
        assert (values.to_numpy() % 1 != 0).all()
        with pytest.raises(Exception, match=r"temperature \(0.5\): the VAE has a gaussian head"):
            model.predict(pd.DataFrame(ROWS), params={"temperature": 0.5})
        with pytest.raises(Exception, match="library_size in row 1 of the conditions: the VAE has a gaussian head"):
            model.predict(pd.DataFrame([{"n_cells": 1, "library_size": 500}]))
