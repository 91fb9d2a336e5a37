"""The model that MLflow loads: conditions in, counts out. This file is stored with the model and run when it is loaded.

It holds no weights and no pickle: `load_context` reads the model folders (safetensors and JSON) in the same artifact.
The code of `scldm` and `pipeline` is stored with the model too, so that only torch, numpy, pandas, scipy and pydantic
must be installed.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import mlflow
import pandas as pd
from mlflow.pyfunc import PythonModel


class ConditionsToCounts(PythonModel):
    """`predict(DataFrame of conditions) -> DataFrame of counts`, one row per cell, one column per gene."""

    def load_context(self, context: Any) -> None:
        from scldm.checkpoints.native import load_flow, load_vae

        folders = {k: Path(v) for k, v in context.artifacts.items()}
        self.vae = load_vae(folders["vae"])
        self.flow = load_flow(folders["flow"], weights="ema")

    def predict(self, context: Any, model_input: pd.DataFrame, params: dict[str, Any] | None = None) -> pd.DataFrame:
        """Generate cells for a table of conditions, row after row.

        Args:
            model_input: Columns: labels of the model, and optionally n_cells (default 1), guidance, library_size. An
                empty label generates cells without that label.
            params: seed (0), guidance (1), steps (14), temperature (1).
        """
        import numpy as np

        from pipeline.config.stages import GenerateConfig
        from pipeline.inference.request import recipe_of
        from scldm.data.user_table import whole_table
        from scldm.generation.cell_maker import CellMaker
        from scldm.generation.request import Request, RequestRow
        from scldm.generation.request_table import read_rows

        given = dict(params or {})
        sampler = {k: given[k] for k in ("guidance", "steps", "temperature") if given.get(k) is not None}
        config = GenerateConfig.model_validate({"sampler": sampler, "seed": int(given.get("seed") or 0), "n_cells": 1})
        table = whole_table(
            model_input, "the table", self.flow.vocabulary
        )  # before n_cells is looked for: it may be in the index
        table = table if "n_cells" in table else table.assign(n_cells=1)
        problems: list[str] = []
        flow = self.flow
        rows = read_rows(table, "the table", flow.vocabulary, problems)
        if problems:
            raise ValueError("\n".join(problems))
        request = Request(tuple(RequestRow(**row) for row in rows))
        recipe = recipe_of(request, config, flow.vocabulary, flow.library_sizes, flow.dit.strategy)
        maker = CellMaker(self.vae, flow, recipe, sampler=config.sampler, seed=config.seed)
        parts = [cells.values.toarray() for cells in maker.cells(0, request.n_cells)]
        genes = list(flow.vocabulary.feature_ids)
        counts = np.concatenate([np.zeros((0, len(genes)), np.int32), *parts])
        return pd.DataFrame(counts, columns=genes)


mlflow.models.set_model(ConditionsToCounts())
