"""What an old model is asked for if it generates old cells, and what comes of it in ingest."""

from __future__ import annotations

from functools import partial
from types import SimpleNamespace

import anndata
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp
from helpers.models.small_models import CELL_TYPES, DONORS, GENES, write_flow, write_vae
from helpers.stages.generation_case import NoTracker, local_pool

from pipeline.config.context import StageContext
from pipeline.config.job import IngestConfig, ResourcesConfig
from pipeline.core.manifest import Manifest
from pipeline.data.ingest.dataset import IngestedDataset
from pipeline.data.loading.blocks import LABEL
from pipeline.inference.replay import old_model_problems, request_old_cells
from pipeline.stages import generate, ingest
from scldm.data.library_size import LibrarySizes, LogNormal
from scldm.data.vocabulary import LabelVocabulary


def sized(flow, **n_cells: int | None):
    """Give a flow library sizes with these numbers of cells: `T_d1` is the combination of T and d1."""
    table = {"all": LogNormal(5.0, 0.1, 1)}
    for name, n in n_cells.items():
        cell_type, _, donor = name.partition("_")
        table[f"cell_type={cell_type}" + (f"|donor={donor}" if donor else "")] = LogNormal(5.0, 0.1, n)
    LibrarySizes(table).save(flow / "library_size.json")


@pytest.fixture
def old(tmp_path):
    labels = (CELL_TYPES, DONORS)
    write_vae(tmp_path / "old/vae", *labels)
    write_flow(tmp_path / "old/flow", *labels)
    return tmp_path / "old"


def asked(old, n, seed=0):
    rows = request_old_cells(str(old), n, seed=seed).cells
    return {tuple(v for k, v in row.items() if k != "n_cells"): row["n_cells"] for row in rows}


def test_combinations_have_the_shares_that_they_had_in_training(old):
    sized(old / "flow", T=40, B=60, T_d1=30, T_d_2=10, B_d1=60)
    assert asked(old, 10) == {("T", "d1"): 3, ("T", "d_2"): 1, ("B", "d1"): 6}
    assert sum(asked(old, 7).values()) == 7


def test_a_model_that_does_not_state_numbers_of_cells_is_asked_for_all_alike(old):
    sized(old / "flow", T=None, B=None)
    assert asked(old, 9) == {("T",): 3, ("B",): 3, ("NK",): 3}


def test_statistics_of_single_labels_give_the_shares_of_the_label_that_is_counted_best(old):
    sized(old / "flow", T=30, B=10)
    assert asked(old, 8) == {("T",): 6, ("B",): 2}


def test_names_of_classes_may_hold_the_signs_between_them(tmp_path):
    odd = LabelVocabulary("cell_type", ("A", "A|donor=d1", "B=2"))
    write_vae(tmp_path / "vae", odd, DONORS)
    write_flow(tmp_path / "flow", odd, DONORS)
    table = {f"cell_type={c}|donor={d}": LogNormal(5, 1, 1) for c in odd.classes for d in DONORS.classes}
    LibrarySizes({"all": LogNormal(5, 1, 9), **table}).save(tmp_path / "flow/library_size.json")
    n = len(odd.classes) * len(DONORS.classes)
    assert asked(tmp_path, n) == {(c, d): 1 for c in odd.classes for d in DONORS.classes}


def test_models_that_are_no_pair_are_named_before_the_job_starts(tmp_path, old):
    assert old_model_problems(str(old)) == []
    write_vae(old / "vae", CELL_TYPES)
    assert "ingest.replay.model: the VAE and the flow were trained with different" in old_model_problems(str(old))[0]
    assert "ingest.replay.model" in old_model_problems(str(tmp_path / "nothing"))[0]


def test_generated_cells_are_trained_on_with_the_classes_that_they_were_asked_for(tmp_path, old, monkeypatch):
    monkeypatch.setattr(generate, "run", partial(generate.run, pool=local_pool))
    sized(old / "flow", T=1, B=1, T_d1=10, B_d_2=10)
    counts = np.random.default_rng(0).poisson(9, (100, len(GENES))).astype(np.float32)
    obs = pd.DataFrame({"cell_type": ["new", "B"] * 50}, index=[f"c{i}" for i in range(100)])
    cells = anndata.AnnData(sp.csr_matrix(counts), obs=obs, var=pd.DataFrame(index=GENES))
    cells.write_h5ad(tmp_path / "new.h5ad")
    config = {"source": {"type": "h5ad", "path": str(tmp_path / "new.h5ad")}, "labels": ["cell_type"]}
    config["replay"] = {"model": str(old), "share": 0.4}

    def ingested(name):
        folder = tmp_path / name
        folder.mkdir()
        context = StageContext(folder, {}, 0, ResourcesConfig(cpus_per_worker=1), NoTracker())
        facts = ingest.run(IngestConfig.model_validate(config), context)
        return IngestedDataset.open(Manifest("ingest", "v", str(folder), {}, {}, facts, 0.0, 0.0))

    one, again = ingested("one"), ingested("again")
    replayed = one.cells[one.cells["replayed"].to_numpy()]
    n_new = len(one.cells_of("train"))
    assert len(replayed) == pytest.approx(n_new * 2 / 3, abs=1)
    names = SimpleNamespace(**{c: i for i, c in enumerate(one.vocabulary.label("cell_type").classes)})
    assert set(replayed[LABEL + "cell_type"]) == {names.T, names.B}
    assert one.facts["digest"] == again.facts["digest"]
    ids = one.blocks("train").ids
    assert one.blocks("train").read(ids).equals(again.blocks("train").read(ids))
