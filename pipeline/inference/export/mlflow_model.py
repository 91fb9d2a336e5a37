"""The model that MLflow loads: conditions in, cells out; a VAE alone: counts in, latents out.

This file is stored with the model and run when it is loaded. A cell is a row of counts, or of log1p CP10k values if the
VAE has a Gaussian head; the metadata of the model says which (`scldm.scale`).

It holds no weights and no pickle: `load_context` reads the model folders (safetensors and JSON) in the same artifact.
The code of `scldm` and `pipeline` is stored with the model too, so that only torch, numpy, pandas, scipy, anndata
and pydantic must be installed.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import mlflow
import pandas as pd
from mlflow.pyfunc import PythonModel


class ScldmModel(PythonModel):
    """`predict(DataFrame of conditions) -> DataFrame of cells`, one row per cell, one column per gene.

    Cells are counts, int32; of a VAE with a Gaussian head, log1p of counts per 10,000, float32. A VAE alone makes none:
    `predict(DataFrame of counts) -> DataFrame of latents`, one row per cell.
    """

    def load_context(self, context: Any) -> None:
        from scldm.api.model import load

        folders = {k: Path(v) for k, v in context.artifacts.items()}
        self.model = load(folders["vae"], flow=folders.get("flow"), weights="ema")

    def predict(self, context: Any, model_input: pd.DataFrame, params: dict[str, Any] | None = None) -> pd.DataFrame:
        """Generate cells for a table of conditions, row after row; or, without a flow, encode cells.

        Args:
            model_input: Columns: labels of the model, and optionally n_cells (default 1), guidance, library_size. An
                empty label generates cells without that label. Without a flow: raw counts, a column for each gene id.
            params: seed (0), guidance (1), steps (14), temperature (1); none without a flow. A Gaussian head takes no
                temperature but 1 and no library_size.
        """
        if self.model.flow is not None:
            return self._generate(model_input, dict(params or {}))
        if params:
            raise ValueError(f"this model is a VAE alone, which takes counts and no params; got {', '.join(params)}")
        return self._encode(model_input)

    def _encode(self, counts: pd.DataFrame) -> pd.DataFrame:
        import anndata
        import numpy as np
        import scipy.sparse as sp

        x = sp.csr_matrix(counts.to_numpy(dtype=np.float32))
        obs, var = pd.DataFrame(index=counts.index.astype(str)), pd.DataFrame(index=counts.columns.astype(str))
        return pd.DataFrame(self.model.encode(anndata.AnnData(x, obs=obs, var=var)).obsm["X_scldm"], index=counts.index)

    def _generate(self, table: pd.DataFrame, given: dict[str, Any]) -> pd.DataFrame:
        import numpy as np

        from pipeline.config.stages import GenerateConfig
        from pipeline.inference.request import recipe_of, values_problems
        from scldm.checkpoints.asked_values import with_values
        from scldm.data.user_table import whole_table
        from scldm.generation.cell_maker import CellMaker
        from scldm.generation.request import Request, RequestRow
        from scldm.generation.request_table import read_rows

        flow, counts = self.model.flow, self.model.vae.vae.config.head != "gaussian"
        assert flow is not None
        sampler = {k: given[k] for k in ("guidance", "steps", "temperature") if given.get(k) is not None}
        config = GenerateConfig.model_validate({"sampler": sampler, "seed": int(given.get("seed") or 0), "n_cells": 1})
        table = whole_table(table, "the table", flow.vocabulary)  # before n_cells is looked for: it may be in the index
        table = table if "n_cells" in table else table.assign(n_cells=1)
        problems: list[str] = []
        rows = read_rows(table, "the table", flow.vocabulary, problems)
        request = Request(tuple(RequestRow(**row) for row in rows)) if not problems else Request(())
        if not counts:
            problems += values_problems(config, request)
        if problems:
            raise ValueError("\n".join(problems))
        flow = with_values(flow, (row.condition for row in request.rows))
        recipe = recipe_of(request, config, flow.vocabulary, flow.library_sizes, flow.dit.strategy, counts=counts)
        maker = CellMaker(self.model.vae, flow, recipe, sampler=config.sampler, seed=config.seed)
        parts = [cells.values.toarray() for cells in maker.cells(0, request.n_cells)]
        genes = list(flow.vocabulary.feature_ids)
        none = np.zeros((0, len(genes)), np.int32 if counts else np.float32)
        return pd.DataFrame(np.concatenate([none, *parts]), columns=genes)


mlflow.models.set_model(ScldmModel())
