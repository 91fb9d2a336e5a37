"""The notebook in docs/notebooks runs from its first cell to its last."""

from __future__ import annotations

from pathlib import Path

import pytest
from cell_stages import models, real_cells

SCRIPT = Path(__file__).resolve().parents[2] / "docs" / "notebooks" / "model_in_a_notebook.py"
PARAMETERS = {"model_folder": "runs/mine", "cells_file": "cells.h5ad"}


@pytest.mark.filterwarnings("ignore")
def test_every_cell_runs(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    models(tmp_path / "mine")
    real_cells(300).write_h5ad("small.h5ad")
    text = SCRIPT.read_text()
    for name, value in {"model_folder": str(tmp_path / "mine"), "cells_file": "small.h5ad"}.items():
        line = f'{name} = "{PARAMETERS[name]}"'
        assert line in text
        text = text.replace(line, f'{name} = "{value}"')
    names: dict[str, object] = {}
    exec(compile(text, str(SCRIPT), "exec"), names)
    assert names["cells"].n_obs == 200
    assert names["adata"].obsm["X_scldm"].shape == (300, 12)
    assert "auroc" in capsys.readouterr().out
    assert Path("shared_model", "README.md").is_file()
