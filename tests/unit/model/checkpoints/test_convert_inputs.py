"""Sources of a converted model's names and library sizes, and refusals of files that disagree with it."""

from __future__ import annotations

import json
import math
import pickle

import anndata as ad
import numpy as np
import pandas as pd
import pytest
from helpers.models.exported_model import Exported, new_export, run
from helpers.models.small_models import CELL_TYPES, GENES

from scldm.checkpoints.convert.gene_list import read_classes
from scldm.checkpoints.native import load_flow


@pytest.fixture
def exported(tmp_path, monkeypatch) -> Exported:
    return new_export(tmp_path, monkeypatch)


def test_all_cells_have_the_equal_mixture_of_the_classes(exported):
    assert exported.run().exit_code == 0
    sizes = load_flow(exported.out / "flow").library_sizes
    assert {key: s.mean for key, s in sizes.table.items()} == {
        "cell_type=T": 5.0, "cell_type=B": 6.0, "cell_type=NK": 7.0, "all": 6.0,
    }  # fmt: skip
    assert sizes.table["all"].sd == pytest.approx(math.sqrt(0.5**2 + 2 / 3))  # within classes, and between 5, 6, 7
    assert sizes.of({"cell_type": "B"}).mean == 6.0


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda m: m["genes"].append("g6"), ["has 7 genes, the configuration n_genes 6"]),
        (lambda m: m["genes"].__setitem__(1, "g0"), ["1 genes more than once, the first is g0"]),
        (lambda m: m["labels"]["cell_type"].append("DC"), ["4 classes of cell_type", "class_vocab_sizes.cell_type 3"]),
        (lambda m: m["labels"].pop("cell_type"), ["no classes of cell_type; it has: none"]),
        (lambda m: m["labels"].update(cell_type="T"), ["labels.cell_type must be a list of classes"]),
        (lambda m: m["labels"].update(cell_type=["T", "B", "DC"]), ["cell_type has no class 'NK'; it has T, B, DC"]),
    ],
)  # fmt: skip
def test_metadata_of_another_vocabulary_is_refused(exported, change, words):
    (exported.folder / "genes.parquet").unlink()
    metadata = json.loads((exported.folder / "metadata.json").read_text())
    change(metadata)
    (exported.folder / "metadata.json").write_text(json.dumps(metadata))
    exported.refused(*words)


def test_a_class_that_is_named_twice_is_refused(exported):
    metadata = {"labels": {"cell_type": ["T", "B", "B"]}}
    (exported.folder / "metadata.json").write_text(json.dumps(metadata))
    exported.refused("label 'cell_type' has duplicate classes", options=("--no-size-factors",))


def test_names_that_disagree_with_the_checkpoints_own_are_refused_with_place_and_both_values(exported):
    exported.save_vocabulary(genes=["g0", "h1", *GENES[2:]])
    exported.refused("genes, number 1, is 'g1'; the vocabulary saved in the checkpoint has 'h1'")
    exported.save_vocabulary(genes=list(GENES[:5]))
    exported.refused("has 6 genes, the vocabulary saved in the checkpoint 5")
    exported.save_vocabulary(labels={"cell_type": ["B", "T", "NK"]})
    exported.refused("classes of cell_type, number 0, is 'T'; the vocabulary saved in the checkpoint has 'B'")


def test_without_files_the_checkpoints_own_vocabulary_is_used(exported):
    for path in exported.folder.iterdir():
        if path.name not in ("model.ckpt", "config.yaml"):
            path.unlink()
    exported.refused("gene names", "--genes", "classes of cell_type", "--metadata", "--size-factors-mu")  # all at once
    factors = {"mu_size_factor": {"cell_type": {"0": 5.5, "2": 7.5}}, "sd_size_factor": {"cell_type": {"0": 1, "2": 2}}}
    exported.save_vocabulary(genes=list(GENES), labels={"cell_type": list(CELL_TYPES.classes)}, **factors)
    result = exported.run()
    assert result.exit_code == 0, result.output
    assert result.output.count("the checkpoint itself") == 3
    assert "1 of 3 are not given; they fall back" in result.output
    table = load_flow(exported.out / "flow").library_sizes.table
    assert {key: s.mean for key, s in table.items()} == {"cell_type=T": 5.5, "cell_type=NK": 7.5, "all": 6.5}


def test_missing_size_factors_are_an_error_or_a_stated_choice(exported):
    for name in ("mu", "sd"):
        (exported.folder / f"log_size_factor_{name}.pkl").unlink()
    exported.refused("size factors", "--size-factors-mu", "--no-size-factors")
    result = exported.run("--no-size-factors")
    assert result.exit_code == 0
    assert "none: library_size.json says so" in result.output
    with pytest.raises(ValueError, match="converted from upstream without size factors"):
        load_flow(exported.out / "flow").library_sizes.of({"cell_type": "B"})


@pytest.mark.parametrize(
    ("which", "content", "words"),
    [
        ("mu", {"cell_type": {"T": 1.0, "B": 2.0, "DC": 3.0}}, ["cell_type: DC, NK in one of the two files only"]),
        ("sd", {"cell_type": {"T": -1.0, "B": 2.0, "NK": 3.0}}, ["standard deviation of cell_type, T is -1.0"]),
        ("mu", {"cell_type": {"T": float("nan"), "B": 2.0, "NK": 3.0}}, ["the mean of cell_type, T is 'nan'"]),
        ("mu", [1, 2], ["log_size_factor_mu.pkl", "label -> class -> value"]),
    ],
)
def test_size_factors_that_cannot_be_used_are_refused(exported, which, content, words):
    (exported.folder / f"log_size_factor_{which}.pkl").write_bytes(pickle.dumps(content))
    exported.refused(*words)


def test_one_file_of_size_factors_is_not_enough(exported):
    path = exported.folder / "log_size_factor_mu.pkl"
    (exported.folder / "log_size_factor_sd.pkl").unlink()
    exported.refused("go together", options=("--size-factors-mu", path))


def test_missing_files_are_named(exported):
    for checkpoint, config, words in (
        (exported.folder / "absent.ckpt", exported.config, "absent.ckpt"),
        (exported.checkpoint, exported.folder / "absent.yaml", "absent.yaml does not exist"),
    ):
        result = run(checkpoint, config, exported.out)
        assert words in result.output
    result = exported.run("--genes", exported.folder / "genes.xlsx")
    assert (result.exit_code, "genes.xlsx does not exist" in result.output) == (2, True)
    assert not exported.out.exists()


def test_classes_have_the_same_text_as_in_ingest_whatever_their_type(tmp_path):
    (tmp_path / "classes.json").write_text('{"labels": {"cluster": [0, 1.0, 2.5, "B"], "treated": [true, false]}}')
    found = read_classes(tmp_path / "classes.json", ["cluster", "treated"])
    assert found == {"cluster": ["0", "1", "2.5", "B"], "treated": ["True", "False"]}
    obs = pd.DataFrame({"cluster": pd.Categorical([0.0, 1.0, 1.0])}, index=list("abc"))
    ad.AnnData(np.ones((3, 2), np.float32), obs=obs).write_h5ad(tmp_path / "cells.h5ad")
    assert read_classes(tmp_path / "cells.h5ad", ["cluster"]) == {"cluster": ["0", "1"]}
