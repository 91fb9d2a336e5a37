"""`scldm validate-data` names every problem of a file with its number, its first offenders and a remedy."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import anndata as ad
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp
from helpers.files.h5ad_cases import ROOT, SHARED, G, N, counts, look, real, save, told
from typer.testing import CliRunner

from pipeline.cli.app import app
from pipeline.config.job import H5adSource, IngestConfig
from pipeline.data.inspection.examine import Question, examine
from pipeline.data.inspection.sandbox import ask
from pipeline.data.safety.count_matrix import PIECE
from pipeline.data.soma.write import write_experiment
from pipeline.data.sources.h5ad import read_h5ad
from pipeline.data.sources.open import open_source
from scldm.errors import InputError

pytestmark = pytest.mark.filterwarnings("ignore")


# ---- tables and counts ---------------------------------------------------------------------------------------------
def test_a_sound_file_is_usable_and_described(tmp_path):
    found = look(save(tmp_path / "a.h5ad"), "cell_type")
    assert found.findings == []
    assert found.facts["cells"] == N
    assert found.facts["genes"] == G
    assert found.facts["classes"] == {"cell_type": {"a": 20, "b": 20}}
    assert found.facts["suggested labels"] == ["cell_type"]
    assert found.facts["values are"] == "raw counts"


def test_all_problems_are_told_at_once_with_totals(tmp_path):
    x = counts()
    x[0, 0], x[5, 1], x[[7, 9], 2], x[11, 3], x[12] = np.nan, -1, 0.5, 1 << 25, 0
    genes = ["ENSG00000000001.3", "ENSG00000000001.4", "ENSMUSG00000000002", "GAPDH", "<b>", "x" * 300]
    names = [f"c{i}" for i in range(N - 1)] + ["c0"]
    path = save(tmp_path / "a.h5ad", x, genes, names, rare=["one"] + ["rest"] * 38 + [None])
    text = told(look(path, "cell_type", "rare", "absent"))
    for words in (
        "1 values are NaN or infinite (first: cell c0, gene ENSG00000000001.3, value nan)",
        "1 values are negative (first: cell c5, gene ENSG00000000001.4, value -1)",
        "2 values are not whole numbers (first: cell c7, gene ENSMUSG00000000002, value 0.5; cell c9",
        "1 values are above 16,777,216",
        "1 genes are there in several versions (first: ENSG00000000001.3 and ENSG00000000001.4); a version is stripped",
        "several organisms (2 human, 1 mouse) (first: ENSMUSG00000000002)",
        "2 gene ids have a version",
        "3 of 6 gene ids are no Ensembl ids (first: GAPDH; <b>; xxx",
        "1 gene ids hold markup or control characters",
        "1 gene ids are longer than 160 characters",
        "1 obs names occur more than once (first: c0)",
        "1 of 40 cells have no rare (first: c0); leave them out with ingest.missing_label: drop",
        "1 classes of rare have one cell (first: one)",
        "obs has no column 'absent' (columns: cell_type, rare)",
        "1 of 40 cells have no counts (first: cell c12)",
    ):
        assert words in text, f"{words}\n--- not in\n{text}"


def test_counting_goes_on_behind_the_first_bad_piece(tmp_path):
    x = sp.random(3000, 2000, 0.5, format="csr", random_state=0, dtype=np.float32)  # 3 M fractions: two pieces
    assert x.nnz > PIECE
    x.data[:] = 1
    x.data[[0, 5, -1]] = 0.25
    found = look(save(tmp_path / "a.h5ad", x))
    assert [f.count for f in found.errors] == [3]
    assert "cell c2999" in told(found)


@pytest.mark.parametrize(
    ("change", "guess"),
    [
        (np.log1p, "log-transformed values"),
        (lambda x: x / x.sum(1, keepdims=True) * 10_000, "values normalised to 10,000 per cell"),
        (lambda x: (x - x.mean(0)) / x.std(0), "scaled values"),
    ],
    ids=["log1p", "normalised", "scaled"],
)
def test_what_was_done_to_counts_is_guessed_and_where_they_are_is_said(tmp_path, change, guess):
    path = save(tmp_path / "a.h5ad", change(counts()))
    a = ad.read_h5ad(path)
    a.layers["umi"] = counts()
    a.write_h5ad(path)
    text = told(look(path))
    assert f"these look like {guess}; this file has counts elsewhere: set ingest.source.layer: umi" in text
    assert look(path, layer="umi").findings == []


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda x: x * np.float32(1.0000001), [".000000", "counts with rounding errors", "numpy.rint"]),
        (lambda x: x * 37.3, ["corrected or averaged", "SoupX or DecontX", "use the uncorrected counts"]),
        (np.log1p, ["log-transformed values"]),
        (lambda x: x / x.sum(1, keepdims=True) * 10_000, ["values normalised to 10,000 per cell"]),
    ],
    ids=["nearly whole", "corrected", "log1p", "normalised"],
)
def test_validate_and_ingest_say_what_fractions_are_and_what_to_do(tmp_path, change, said):
    path = save(tmp_path / "a.h5ad", change(counts()).astype(np.float32))
    config = IngestConfig.model_validate({"source": {"type": "h5ad", "path": str(path)}})
    with pytest.raises(InputError) as refused:
        open_source(config, tmp_path, ["cell_type"])
    for text in (told(look(path)), str(refused.value)):
        for words in said:
            assert words in text


def test_the_remedy_for_rounding_errors_works(tmp_path):
    path = save(tmp_path / "a.h5ad", np.rint(counts() * np.float32(1.0000001)))
    assert look(path).errors == []


# ---- other sources -------------------------------------------------------------------------------------------------
def test_several_files_are_looked_at_apart_and_together(tmp_path):
    save(tmp_path / "a.h5ad")
    save(tmp_path / "b.h5ad", counts()[:, :4])
    save(tmp_path / "c.h5ad", np.log1p(counts()))
    a, b, c, whole = examine(Question(str(tmp_path)))
    assert [len(x.errors) for x in (a, b, c, whole)] == [0, 0, 1, 1]
    assert "1 of 3 files have errors" in told(whole)
    assert "different numbers of genes (4, 6)" in told(whole)


def test_an_experiment_is_examined_like_a_file(tmp_path):
    x = sp.csr_matrix(counts())
    x.data[4] = 0.5
    obs = pd.DataFrame({"obs_id": [f"c{i}" for i in range(N)], "cell_type": pd.Categorical(["a", "b"] * 20)})
    var = pd.DataFrame({"feature_id": [f"ENSG{i:011d}" for i in range(G)], "feature_name": "x", "feature_length": 0})
    write_experiment(tmp_path / "soma", obs, var, [x], tile=16)
    found = look(tmp_path / "soma", "cell_type")
    assert "1 values are not whole numbers (first: cell c0, gene ENSG00000000004, value 0.5)" in told(found)
    assert found.facts["classes"] == {"cell_type": {"a": 20, "b": 20}}


@real
def test_odd_real_files_get_an_answer():
    edge = SHARED / "edge"
    answers = [f for folder in ("h5ad_versions", "10x", "10x/scanpy/1.2.0", "10x/scanpy/3.0.0", "10x/monocle3_cr3.0")
               for f in examine(Question(str(edge / folder)))]  # fmt: skip
    by_name = {Path(a.where).name: a for a in answers}
    assert len(answers) > 18
    assert by_name["cellxgene_nan.h5ad"].errors[0].count == 2556
    assert "set ingest.source.layer: counts" in told(by_name["zellkonverter_example_anndata.h5ad"])
    assert "has no X" in told(by_name["anndata_v0.11.4.h5ad"])
    assert by_name["cellxgene_schema_merfish_mouse_val.h5ad"].errors == []
    assert by_name["filtered_feature_bc_matrix.h5"].errors == []
    assert "set ingest.source.genome to one of" in told(by_name["multiple_genomes.h5"])


@real
def test_real_cells_are_usable_and_the_ids_they_have_are_named():
    text = told(look(SHARED / "pbmc3k_full.h5ad", "cell_type"))
    assert "32738 of 32738 gene ids are no Ensembl ids" in text
    assert "set ingest.source.gene_id: ensembl_id" in text
    missing = look(SHARED / "edge" / "pbmc3k_2700_62missing_labels.h5ad", "cell_type")
    assert [f.count for f in missing.errors] == [62]


# ---- the command ---------------------------------------------------------------------------------------------------
def test_the_command_exits_with_0_or_2_and_writes_json(tmp_path):
    cli, report = CliRunner(), tmp_path / "findings.json"
    good, bad = save(tmp_path / "good.h5ad"), save(tmp_path / "bad.h5ad", -counts())
    done = cli.invoke(app, ["validate-data", str(good), "--label", "cell_type", "--json", str(report)])
    assert (done.exit_code, json.loads(report.read_text())["usable"]) == (0, True)
    assert "good.h5ad (h5ad): usable" in done.stdout
    done = cli.invoke(app, ["validate-data", str(bad), "--json", str(report)])
    assert done.exit_code == 2
    [found] = json.loads(report.read_text())["found"]
    assert found["findings"][0]["count"] == N * G
    assert found["findings"][0]["remedy"].startswith("raw counts are needed")


def test_a_reader_that_dies_is_a_bad_file_not_a_crash(tmp_path):
    wide = save(tmp_path / "wide.h5ad")
    code = (
        "import resource; resource.setrlimit(resource.RLIMIT_DATA, (64 << 20,) * 2)\n"
        "from pipeline.cli.app import main; import sys; sys.argv[1:] = ['validate-data', sys.argv[1]]; main()"
    )
    done = subprocess.run([sys.executable, "-c", code, str(wide)], env={**os.environ, "PYTHONPATH": str(ROOT)},
                          capture_output=True, text=True, timeout=120)  # fmt: skip
    assert done.returncode == 2
    assert "wide.h5ad cannot be read: " in done.stderr
    assert "Traceback" not in done.stdout + done.stderr


@pytest.mark.parametrize(
    ("code", "words"),
    [
        ("raise MemoryError", "takes more memory than 2 GiB (MemoryError); allow more with --memory-gib"),
        ("raise RuntimeError('TileDB: std::bad_alloc')", "takes more memory than 2 GiB"),
        ("os.kill(os.getpid(), 9)", "killed by SIGKILL, as the system does if memory runs out"),
        ("os.kill(os.getpid(), 11)", "killed by SIGSEGV (no message), as damaged files do"),
        ("raise KeyError('obs\\x1b[2J')", "raised KeyError: 'obs\\x1b[2J', which is a fault of the file that is not"),
    ],
)
def test_a_reader_that_cannot_answer_says_why(code, words):
    with pytest.raises(InputError) as error:
        ask({"uri": "cells.h5ad"}, 2, f"import os, sys; sys.stdin.read(); {code}")
    said = str(error.value)
    assert said.startswith("cells.h5ad cannot be read: ")
    assert words in said
    log = Path(said.rpartition("with the log: ")[2])
    assert ("KeyError" in code) == ("Traceback" in log.read_text() if log.is_file() else False)
    log.unlink(missing_ok=True)


def test_what_a_reader_refuses_is_said_as_it_is():
    child = (
        "from pipeline.data.inspection.sandbox import serve; from scldm.errors import InputError\n"
        "def refuse(question): raise InputError('no cells')\n"
        "serve(refuse)"
    )
    with pytest.raises(InputError, match=r"^no cells$"):
        ask({"uri": "cells.h5ad"}, 2, child)


def test_a_label_of_measurements_is_refused_and_a_long_list_of_classes_is_cut(tmp_path):
    obs = pd.DataFrame({"age": np.linspace(0.5, 9.7, 60), "donor": [f"d{i % 30}" for i in range(60)]})
    obs.index = [f"c{i}" for i in range(60)]
    ad.AnnData(sp.csr_matrix(np.ones((60, 3), np.float32)), obs=obs).write_h5ad(tmp_path / "a.h5ad")
    [found] = examine(Question(str(tmp_path / "a.h5ad"), labels=("age", "donor")))
    assert [f.what for f in found.errors] == ["age holds 60 different measurements, not classes"]
    assert "… and 10 more" in found.text()


@pytest.mark.parametrize("name", ["._*", "._a.h5ad"])
def test_what_macos_left_is_called_that(name, tmp_path):
    (tmp_path / "._a.h5ad").write_bytes(b"\x00\x05\x16\x07")
    [found] = examine(Question(str(tmp_path / name)))
    assert "what macOS wrote beside a file" in told(found)
    with pytest.raises(InputError, match="what macOS wrote beside a file"):
        read_h5ad(H5adSource.model_validate({"type": "h5ad", "path": str(tmp_path / name)}))


def test_a_folder_without_cells_is_not_called_absent(tmp_path):
    [found] = examine(Question(str(tmp_path)))
    assert "no .h5ad, Cell Ranger output or SOMA experiment is in the folder (it holds nothing)" in found.errors[0].what
