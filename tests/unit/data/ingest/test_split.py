"""Splits: no cell, donor, data set, tile or held-out combination on two sides, whatever the data."""

from pathlib import Path
from types import SimpleNamespace

import anndata as ad
import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.config.context import StageContext
from pipeline.config.job import HeldOutConfig, IngestConfig, SplitConfig
from pipeline.core.manifest import Manifest
from pipeline.data.ingest.dataset import IngestedDataset
from pipeline.data.ingest.held_out import counted, find_classes, hold_out, read_combinations
from pipeline.data.ingest.split import SPLITS, split_cells
from pipeline.data.ingest.subsample import subsample_cells
from pipeline.stages import ingest
from scldm.errors import InputError

SYNTHETIC = {"type": "synthetic", "n_cells": 600, "n_genes": 40, "n_types": 3, "n_donors": 6}
B, MONOCYTE = "CD4-positive, alpha-beta T cell", "classical monocyte"


def run(folder: Path, **config):
    folder.mkdir(exist_ok=True)
    context = StageContext(folder, {}, 0, SimpleNamespace(), None)
    facts = ingest.run(IngestConfig.model_validate({"source": SYNTHETIC, **config}), context)
    return facts, IngestedDataset.open(Manifest("ingest", "v", str(folder), {}, {}, facts, 0.0, 0.0))


some_cells = st.builds(
    lambda n, donors, types, start: pd.DataFrame(
        {
            "soma_joinid": np.arange(start, start + n),
            "donor_id": [f"d{i % donors}" for i in range(n)],
            "dataset_id": [f"s{i % max(1, donors // 2)}" for i in range(n)],
            "cell_type": [f"t{(i * 7) % types}" for i in range(n)],
        }
    ),
    st.integers(1, 400),
    st.integers(1, 30),
    st.integers(1, 9),
    st.integers(0, 10**9),
)


@settings(deadline=None, max_examples=60)
@given(cells=some_cells, by=st.sampled_from(["cell", "tile", "donor_id", "dataset_id"]), salt=st.text(max_size=5))
def test_what_is_split_by_is_never_on_two_sides(cells, by, salt):
    config = SplitConfig(by=by, salt=salt, validation=0.3, test=0.3)
    split = split_cells(cells, config, tile=16)
    assert set(split) <= set(SPLITS)
    groups = {"cell": cells["soma_joinid"], "tile": cells["soma_joinid"] // 16}.get(by, cells.get(by))
    assert (pd.Series(split).groupby(groups.to_numpy()).nunique() == 1).all()
    # ... and each cell's side is its own: half of the cells, shuffled, are where they were.
    some = np.random.default_rng(0).permutation(len(cells))[: len(cells) // 2 + 1]
    assert (split_cells(cells.iloc[some].reset_index(drop=True), config, tile=16) == split[some]).all()


@settings(deadline=None, max_examples=60)
@given(cells=some_cells, data=st.data())
def test_no_cell_of_a_held_out_combination_is_on_another_side(cells, data):
    pairs = list(cells.groupby(["cell_type", "donor_id"]).groups)
    chosen = data.draw(st.lists(st.sampled_from(pairs), min_size=1, unique=True))
    side = data.draw(st.sampled_from(["validation", "test"]))
    combinations = [{"cell_type": t, "donor_id": d} for t, d in chosen]
    config = SplitConfig(held_out={"split": side, "combinations": combinations}, salt="x")
    by_hash = split_cells(cells, config)
    split = hold_out(cells, by_hash, read_combinations(config.held_out))
    table = counted(cells, read_combinations(config.held_out))
    has = pd.Series(list(zip(cells["cell_type"], cells["donor_id"], strict=True))).isin(chosen).to_numpy()
    assert (split[has] == side).all()
    assert (split[~has] == by_hash[~has]).all()
    assert side not in split[~has]  # its share is 0 unless it is given
    assert table["n_cells"].tolist() == [
        int(((cells["cell_type"] == t) & (cells["donor_id"] == d)).sum()) for t, d in chosen
    ]


def test_combinations_of_several_columns_and_lists_of_classes(tmp_path):
    held_out = {"combinations": [{"cell_type": [B, MONOCYTE], "donor_id": "donor 1"}, {"tissue_general": "spleen"}]}
    facts, data = run(tmp_path / "a", labels=["cell_type", "donor_id", "tissue_general"], split={"held_out": held_out})
    cells = named(data)
    is_out = (cells["cell_type"].isin([B, MONOCYTE]) & (cells["donor_id"] == "donor 1")) | (
        cells["tissue_general"] == "spleen"
    )
    assert ((cells["split"] == "test") == is_out).all()
    assert facts["n_cells"]["test"] == is_out.sum() > 0
    assert facts["n_cells"]["validation"] > 0
    assert facts["held_out"]["columns"] == ["cell_type", "donor_id", "tissue_general"]
    assert facts["held_out"]["n_combinations"] == {"validation": 0, "test": 3}
    table = pd.read_parquet(tmp_path / "a" / facts["held_out"]["table"])
    assert table["n_cells"].iloc[-1] == (cells["tissue_general"] == "spleen").sum()


def named(data: IngestedDataset) -> pd.DataFrame:
    cells = data.cells
    return pd.DataFrame(
        {x.name: np.asarray(x.classes, object)[cells[f"label:{x.name}"]] for x in data.vocabulary.labels},
    ).assign(split=cells["split"].astype(str).to_numpy())


@pytest.mark.parametrize("ending", ["csv", "parquet"])
def test_a_table_holds_out_for_two_splits(tmp_path, ending):
    table = pd.DataFrame(
        {
            "cell_type": [B, MONOCYTE, None],
            "donor_id": ["donor 1", None, "donor 3"],
            "split": ["test", "validation", "test"],
        }
    )
    path = tmp_path / f"held_out.{ending}"
    table.to_csv(path, index=False) if ending == "csv" else table.to_parquet(path)
    split = {"validation": 0, "held_out": {"table": str(path)}}
    facts, data = run(tmp_path / "a", labels=["cell_type", "donor_id"], split=split)
    cells = named(data)
    test = ((cells["cell_type"] == B) & (cells["donor_id"] == "donor 1")) | (cells["donor_id"] == "donor 3")
    assert ((cells["split"] == "test") == test).all()
    assert ((cells["split"] == "validation") == (~test & (cells["cell_type"] == MONOCYTE))).all()
    assert facts["held_out"]["n_combinations"] == {"validation": 1, "test": 2}


def test_a_column_that_is_no_label_can_be_held_out_by(tmp_path):
    facts, _ = run(tmp_path / "a", split={"held_out": {"combinations": [{"assay": "10x 3' v2"}]}})
    assert facts["n_cells"]["test"] > 100
    assert facts["labels"] == ["cell_type"]


def test_donors_on_both_sides_of_a_combination_are_noted(tmp_path):
    split = {"by": "donor_id", "validation": 0.4, "held_out": {"combinations": [{"cell_type": B}]}}
    facts, data = run(tmp_path / "a", labels=["cell_type", "donor_id"], split=split)
    cells = named(data)
    hashed = cells[cells["cell_type"] != B]
    assert (hashed.groupby("donor_id")["split"].nunique() == 1).all()
    assert any("donor_id have cells both in training and in held-out combinations" in n for n in facts["notes"])


def test_label_counts_are_facts(tmp_path):
    facts, _ = run(tmp_path / "a", split={"held_out": {"combinations": [{"cell_type": B}]}})
    counts = facts["label_counts"]["cell_type"]
    assert counts[B]["train"] == counts[B]["validation"] == 0
    for split in SPLITS:
        assert sum(c[split] for c in counts.values()) == facts["n_cells"][split]


def test_whole_tiles_are_held_out(tmp_path):
    source = {**SYNTHETIC, "n_cells": 30_000, "n_genes": 5}
    _, data = run(tmp_path / "a", source=source, split={"by": "tile", "validation": 0.3, "test": 0.3})
    sides = data.cells.groupby(data.cells["soma_joinid"] // 2048)["split"].nunique()
    assert (sides == 1).all()
    assert data.cells["split"].nunique() == 3


def test_a_share_that_is_given_is_kept_beside_combinations():
    held_out = {"combinations": [{"a": "b"}]}
    assert SplitConfig(held_out=held_out).test == 0
    assert SplitConfig(held_out=held_out, test=0.2).test == 0.2
    assert SplitConfig(held_out=held_out).validation == 0.1
    assert SplitConfig(held_out={**held_out, "split": "validation"}).validation == 0
    assert SplitConfig.model_validate(SplitConfig(held_out=held_out).model_dump()).test == 0


def test_mistakes_are_explained(tmp_path):
    for held_out, words in [
        ({"combinations": [{"cell_typ": "B cell"}]}, "obs has no column 'cell_typ' .did you mean 'cell_type'"),
        ({"combinations": [{"cell_type": "clasical monocyte"}]}, "cell_type 'clasical monocyte' .did you mean 'class"),
        (
            {"combinations": [{"cell_type": B}, {"cell_type": [MONOCYTE, B]}]},
            r"combinations\[1\]: .* is held out twice",
        ),
        ({"combinations": [{"tissue_general": ["blood", "lung", "spleen"]}]}, "hold out every cell"),
        ({"table": str(tmp_path / "none.csv")}, "no file .*none.csv"),
        (
            {"table": written(tmp_path / "a.csv", "cell_type,split\nB,train\n")},
            "split is 'train'; it may be validation or",
        ),
        ({"table": written(tmp_path / "b.csv", "cell_type\n")}, "has no rows"),
        ({"table": written(tmp_path / "c.csv", "cell_type,split\n,test\n")}, "row 1: names no class"),
    ]:
        with pytest.raises(InputError, match=words):
            run(tmp_path / "a", split={"held_out": held_out})
    for wrong in ({}, {"combinations": []}, {"combinations": [{}]}, {"combinations": [{"a": "b"}], "table": "x"}):
        with pytest.raises(ValueError, match="combinations"):
            HeldOutConfig.model_validate(wrong)


def written(path: Path, text: str) -> str:
    path.write_text(text)
    return str(path)


# ---- a part of many cells --------------------------------------------------------------------------------------------
def tiles_of(joinids, places):
    return np.bincount(joinids[places] // 100)


def test_a_part_of_a_large_store_is_of_sixteen_tiles_in_equal_shares():
    joinids = np.arange(100_000)
    places = subsample_cells(joinids, 400, tile=100)
    assert len(np.unique(places)) == 400
    given = tiles_of(joinids, places)
    assert sorted(given[given > 0]) == [25] * 16
    assert (np.flatnonzero(given) > 500).any()
    assert (np.flatnonzero(given) < 500).any()


def test_a_large_part_is_of_whole_tiles_and_of_few_small_ones_every_tile_gives():
    joinids = np.arange(100_000)
    assert (np.sort(tiles_of(joinids, subsample_cells(joinids, 5000, tile=100)))[-50:] == 100).all()
    two = tiles_of(joinids, subsample_cells(joinids[:200], 100, tile=100))
    assert abs(two[0] - two[1]) <= 7  # a share: 100 cells in sixteen parts
    assert len(subsample_cells(joinids[:200], 500, tile=100)) == 200


def test_which_cells_are_taken_says_nothing_about_their_side():
    cells = pd.DataFrame({"soma_joinid": np.arange(100_000)})
    places = subsample_cells(cells["soma_joinid"].to_numpy(), 8000, tile=2048)
    side = split_cells(cells, SplitConfig())[places]
    assert 0.08 < (side == "test").mean() < 0.12


# ---- held-out combinations that users write --------------------------------------------------------------------------
CELLS = pd.DataFrame({"cell_type": ["B", "NK", "B "], "dose": ["0.1", "1", "10"]}).astype("category")


def combinations(tmp_path, text: str):
    return read_combinations(SplitConfig(held_out={"table": written(tmp_path / "held.csv", text)}).held_out)


def held_out_error(tmp_path, text: str) -> str:
    with pytest.raises(InputError) as error:
        hold_out(CELLS, np.full(3, "train"), find_classes(CELLS, combinations(tmp_path, text)))
    return str(error.value)


def test_held_out_classes_are_found_as_the_data_call_them(tmp_path):
    table = combinations(tmp_path, "\ufeffcell_type;dose\r\nNK ; 1.0\r\n;0.10\r\n;;\r\n")
    assert [x.classes for x in find_classes(CELLS, table)] == [{"cell_type": "NK", "dose": "1"}, {"dose": "0.1"}]
    inline = read_combinations(SplitConfig(held_out={"combinations": [{"dose": [1.0, 10]}]}).held_out)
    assert [x.classes["dose"] for x in find_classes(CELLS, inline)] == ["1", "10"]
    texts = CELLS.assign(dose=["1", "1.0", "2.0"])
    assert [x.classes["dose"] for x in find_classes(texts, combinations(tmp_path, "dose\n1.0\n2\n"))] == ["1.0", "2.0"]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("cell_type,dose\nNK,1\nNK,1e1\n", ["row 2 (cell_type 'NK', dose '1e1')", "'1e1' (did you mean '10'?"]),
        ("cell_type\nnk\n", ["row 1 (cell_type 'nk')", "did you mean 'NK'?"]),
        ("cell_type,dose\nNK,10\n", ["none of the 1 combinations has cells: cell_type 'NK', dose '10' (", "row 1)"]),
        ("dose\n1\n1.0\n", ["row 2: dose '1' is held out twice, first by ", "row 1"]),
        ("dose,split\n1,Test\n", ["row 1: split is 'Test'"]),
    ],
)  # fmt: skip
def test_errors_about_a_held_out_table_name_it_with_the_row(tmp_path, text, words):
    said = held_out_error(tmp_path, text)
    assert [w for w in ["ingest.split.held_out.table: held.csv, ", *words] if w not in said] == []


def test_a_held_out_column_that_obs_lacks_is_a_fault_of_the_table(tmp_path):
    table = written(tmp_path / "held.csv", "Cell_Type,donor\nB,d1\n")
    with pytest.raises(InputError) as error:
        run(tmp_path / "a", split={"held_out": {"table": table}})
    said = str(error.value)
    assert (
        "ingest.split.held_out.table: held.csv, row 1: obs has no column 'Cell_Type' (did you mean 'cell_type'?" in said
    )
    assert said.endswith("; name one that it has, or leave the column out")
    assert "ingest.source.columns" not in said
    assert "ingest.labels" not in said
    with pytest.raises(InputError, match=r"held_out\.combinations\[0\]: obs has no column 'donor'"):
        run(tmp_path / "a", split={"held_out": {"combinations": [{"donor": "d1"}]}})


def test_a_held_out_column_that_a_file_lacks_is_no_fault_of_the_file(tmp_path):
    n = 40
    cells = ad.AnnData(
        np.random.default_rng(0).poisson(2, (n, 6)).astype(np.float32), obs=pd.DataFrame({"cell_type": ["a", "b"] * 20})
    )
    cells.write_h5ad(tmp_path / "a.h5ad")
    table = written(tmp_path / "held.csv", "cell_type,n_cells\na,3\n")
    source = {"type": "h5ad", "path": str(tmp_path / "a.h5ad")}
    said = r"^ingest\.split\.held_out\.table: held.csv, row 1: obs has no column 'n_cells'"
    with pytest.raises(InputError, match=said):
        run(tmp_path / "a", source=source, split={"held_out": {"table": table}})
