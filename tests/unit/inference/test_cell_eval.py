"""`scldm cells export --to cell-eval`: generated and measured cells as that tool compares them."""

from __future__ import annotations

from pathlib import Path

import anndata
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp
from helpers.stages.cell_stages import models, run_stage, write_soma
from helpers.stages.cells_commands import run

from pipeline.inference.export import cell_eval
from pipeline.inference.export.cell_eval import CONTEXT, PERTURBATION, cell_eval_sides, export_cell_eval
from scldm.data.vocabulary import LabelVocabulary, Vocabulary
from scldm.errors import InputError
from scldm.metrics.genes.expression import log1p_cp10k

CONTROL = {"drug": "PBS"}


def cells(pairs: list[tuple[str, str]], n: int = 12, seed: int = 0) -> anndata.AnnData:
    rng = np.random.default_rng(seed)
    each = [pair for pair in pairs for _ in range(n)]
    obs = pd.DataFrame(each, columns=["type", "drug"], index=[str(i) for i in range(len(each))]).astype("category")
    return anndata.AnnData(sp.csr_matrix(rng.poisson(2.0, (len(each), 5)).astype(np.float32)), obs)


TRAINING = cells([("B", "PBS"), ("T", "PBS"), ("T", "IFN"), ("NK", "PBS")])


def test_both_files_hold_the_same_controls_and_what_was_asked_for() -> None:
    measured = cells([("B", "IFN"), ("B", "PBS"), ("NK", "IL2")], seed=1)
    generated = cells([("B", "IFN")], n=20, seed=2)
    sides = cell_eval_sides(generated, measured, TRAINING, control=CONTROL, context=["type"])
    for name, source, n in (("pred", generated, 20), ("real", measured, 12)):
        obs = sides[name].obs
        assert obs[PERTURBATION].value_counts().to_dict() == {"IFN": n, "PBS": 12}
        assert set(obs[CONTEXT]) == {"B"}
        assert obs.index.is_unique
        np.testing.assert_allclose(sides[name].X[:n].toarray(), log1p_cp10k(source.X[:n]).toarray(), rtol=1e-6)
    assert (sides["pred"].X[-12:] != sides["real"].X[-12:]).nnz == 0
    np.testing.assert_allclose(sides["real"].X[-12:].toarray(), log1p_cp10k(TRAINING.X[:12]).toarray(), rtol=1e-6)


def test_without_other_labels_there_is_no_context() -> None:
    sides = cell_eval_sides(cells([("B", "IFN")]), cells([("T", "IFN")]), TRAINING, control=CONTROL, context=[])
    assert list(sides["real"].obs) == [PERTURBATION]
    assert (sides["real"].obs[PERTURBATION] == "PBS").sum() == 36


@pytest.mark.parametrize(
    ("pairs", "words"),
    [
        ([("B", "PBS")], "no held-out cell has a treatment that was generated"),
        ([("T", "IFN")], "no held-out cell has a treatment that was generated"),
        ([("D", "IFN")], "fewer than 10 training cells of the control 'PBS' in D"),
    ],
)
def test_what_cannot_be_compared_is_refused(pairs: list[tuple[str, str]], words: str) -> None:
    measured = cells([("B", "IFN"), ("D", "IFN")], seed=1)
    with pytest.raises(InputError, match=words):
        cell_eval_sides(cells(pairs), measured, TRAINING, control=CONTROL, context=["type"])


def test_all_that_is_wrong_with_the_control_is_said_at_once() -> None:
    vocabulary = Vocabulary((), (), (LabelVocabulary("drug", ("IFN", "PBS")), LabelVocabulary("type", ("B",))))
    with pytest.raises(InputError, match="no class 'ctrl'; it has IFN, PBS\nthe cells have no label 'dose'"):
        cell_eval._context(vocabulary, {"drug": "ctrl", "dose": "0"})
    with pytest.raises(InputError, match="--control LABEL=CLASS"):
        cell_eval._context(vocabulary, {})
    assert cell_eval._context(vocabulary, {"drug": "PBS"}) == ["type"]


def test_cells_of_no_pipeline_are_refused_and_nothing_is_written(tmp_path: Path) -> None:
    config = {"source": write_soma(tmp_path / "soma"), "model": {"vae": models(tmp_path)["vae"]}, "shard_size": 40}
    stage = run_stage("reconstruct", tmp_path / "stage", {**config, "decode": "counts"})
    before = sorted(tmp_path.iterdir())
    result = run("export", stage, tmp_path / "out", "--to", "cell-eval", "--control", "drug=PBS")
    assert result.exit_code == 2
    assert "lies in no pipeline with an ingest" in result.output
    assert run("export", stage, tmp_path / "out", "--to", "h5ad", "--control", "drug=PBS").exit_code == 2
    assert run("export", stage, tmp_path / "out", "--to", "cell-eval", "--control", "drug").exit_code == 2
    assert sorted(tmp_path.iterdir()) == before


def test_another_folder_is_never_written_over(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="exists already"):
        export_cell_eval(None, tmp_path, control=CONTROL)  # type: ignore[arg-type]
