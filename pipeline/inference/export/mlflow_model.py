"""The model that MLflow loads: conditions in, cells out. This file is stored with the model and run when it is loaded.

A cell is a row of counts, or of log1p CP10k values if the VAE has a Gaussian head; the metadata of the model says which
(`scldm.scale`).

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


class ConditionsToCells(PythonModel):
    """`predict(DataFrame of conditions) -> DataFrame of values`, one row per cell, one column per gene.

    The values are counts, int32; of a Gaussian head log1p CP10k, float32.
    """

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
            params: seed (0), guidance (1), steps (14), temperature (1). A Gaussian head takes no temperature but 1 and
                no library_size.
        """
        import numpy as np

        from pipeline.config.stages import GenerateConfig
        from pipeline.inference.request import recipe_of, values_problems
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
        counts = self.vae.vae.config.head != "gaussian"
        if not counts and (problems := values_problems(config, request)):
            raise ValueError("\n".join(problems))
        recipe = recipe_of(request, config, flow.vocabulary, flow.library_sizes, flow.dit.strategy, counts=counts)
        maker = CellMaker(self.vae, flow, recipe, sampler=config.sampler, seed=config.seed)
        parts = [cells.values.toarray() for cells in maker.cells(0, request.n_cells)]
        genes = list(flow.vocabulary.feature_ids)
        nothing = np.zeros((0, len(genes)), np.int32 if counts else np.float32)
        return pd.DataFrame(np.concatenate([nothing, *parts]), columns=genes)


mlflow.models.set_model(ConditionsToCells())
