"""Several files are looked at together: validate-data, init and ingest say the same of them."""

import anndata as ad
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp
from helpers.files.corpus.tenx import write_h5
from helpers.files.h5ad_cases import counts

from pipeline.cli.init.inspect import inspect_source
from pipeline.config.job import IngestConfig
from pipeline.data.inspection.examine import Question, examine
from pipeline.data.sources.open import open_source
from scldm.errors import InputError

N, G = counts().shape
HUMAN, MOUSE = [f"ENSG{i:011d}" for i in range(G)], [f"ENSMUSG{i:011d}" for i in range(G)]
SYMBOLS = [f"GENE{i}" for i in range(G)]


def file(folder, name, genes, label="cell_type", **var):
    cells = [f"{name}{i}" for i in range(N)]
    obs = pd.DataFrame({label: (["a", "b"] * N)[:N]}, index=cells)
    ad.AnnData(counts(), obs=obs, var=pd.DataFrame(var, index=genes)).write_h5ad(folder / f"{name}.h5ad")


def verdict(folder, *labels):
    """Errors and warnings of validate-data, and what ingest raises or opens."""
    found = examine(Question(str(folder), labels=labels))
    config = IngestConfig.model_validate({"source": {"type": "h5ad", "path": str(folder)}, "labels": list(labels)})
    try:
        opened = open_source(config, folder, labels)
    except InputError as problem:
        opened = str(problem)
    return found, "\n".join(f.text() for e in found for f in e.findings), opened


def test_a_file_of_symbols_takes_its_ids_from_its_only_column_of_ensembl_ids(tmp_path):
    file(tmp_path, "a", HUMAN)
    file(tmp_path, "b", SYMBOLS, gene_ids=HUMAN)
    found, _, opened = verdict(tmp_path, "cell_type")
    assert not any(e.errors for e in found)
    assert found[1].facts["gene ids"] == "var column gene_ids"
    assert opened.store.shape == (2 * N, G)
    assert list(opened.store.var()["feature_id"]) == HUMAN
    assert any("b.h5ad: gene ids are taken from var column gene_ids" in n for n in opened.notes)
    rows = opened.store.read_ragged(np.arange(2 * N))
    assert rows.row_sums.tolist() == [*counts().sum(1), *counts().sum(1)]
    assert "errors" not in inspect_source(Question(str(tmp_path)))


@pytest.mark.parametrize("var", [{}, {"gene_ids": HUMAN, "ensembl": HUMAN}], ids=["no column", "two columns"])
def test_two_kinds_of_gene_ids_are_refused_if_nothing_tells_which_genes_they_are(tmp_path, var):
    file(tmp_path, "a", HUMAN)
    file(tmp_path, "b", SYMBOLS, **var)
    found, said, opened = verdict(tmp_path, "cell_type")
    assert found[-1].errors
    for text in (said, opened):
        assert "genes of 1 files are named by Ensembl id, and those of 1 are not (first: b.h5ad)" in text


def test_files_of_two_organisms_are_refused(tmp_path):
    file(tmp_path, "a", HUMAN)
    file(tmp_path, "b", MOUSE)
    _, said, opened = verdict(tmp_path, "cell_type")
    for text in (said, opened):
        assert "several organisms (6 human, 6 mouse)" in text or "several organisms (6 mouse, 6 human)" in text


def test_files_without_a_gene_in_common_are_refused(tmp_path):
    file(tmp_path, "a", SYMBOLS)
    file(tmp_path, "b", [f"other{i}" for i in range(G)])
    _, said, opened = verdict(tmp_path, "cell_type")
    for text in (said, opened):
        assert "2 of 2 files share no gene with any other file (first: a.h5ad; b.h5ad)" in text


def test_files_that_share_few_genes_are_warned_of(tmp_path):
    file(tmp_path, "a", HUMAN)
    file(tmp_path, "b", [*HUMAN[:2], *(f"ENSG{i:011d}" for i in range(50, 54))])
    found, said, opened = verdict(tmp_path, "cell_type")
    assert not any(e.errors for e in found)
    assert "share less than half of their genes" in said
    assert opened.store.shape == (2 * N, G + 4)


@pytest.mark.parametrize("missing", ["error", "drop"])
def test_a_label_that_one_file_lacks_is_an_error_that_names_the_file(tmp_path, missing):
    file(tmp_path, "a", HUMAN)
    file(tmp_path, "b", HUMAN, label="celltype")
    _, said, _ = verdict(tmp_path, "cell_type")
    source = {"type": "h5ad", "path": str(tmp_path)}
    config = IngestConfig.model_validate({"source": source, "missing_label": missing})
    with pytest.raises(InputError) as raised:
        open_source(config, tmp_path, ["cell_type"])
    for text in (said, str(raised.value)):
        assert "1 of 2 files have no obs column 'cell_type' (b.h5ad: did you mean 'celltype'?" in text


def test_init_says_which_columns_only_some_files_have(tmp_path):
    file(tmp_path, "a", HUMAN)
    file(tmp_path, "b", HUMAN, label="celltype")
    warnings = "\n".join(inspect_source(Question(str(tmp_path)))["warnings"])
    assert "obs column 'cell_type' is in 1 of 2 files (first: not in b.h5ad)" in warnings
    assert "obs column 'celltype' is in 1 of 2 files (first: not in a.h5ad)" in warnings


def test_files_and_outputs_of_cell_ranger_in_one_folder_are_told_apart(tmp_path):
    """A job reads one kind: the cells of the other one would be counted and then left aside."""
    file(tmp_path, "a", HUMAN)
    write_h5(tmp_path / "b.h5", counts().astype(int), ids=HUMAN)
    [*_, whole] = examine(Question(str(tmp_path)))
    assert "1 of 2 are of another kind than the first" in whole.text()
    assert "of another kind" in inspect_source(Question(str(tmp_path)))["errors"][0]
    [one] = examine(Question(str(tmp_path / "*.h5ad")))
    assert not one.errors


def cells(n=N, genes=HUMAN, label="cell_type", values=("a", "b"), x=None):
    x = np.random.default_rng(0).poisson(1.0, (n, len(genes))).astype(np.float32) + 1 if x is None else x
    obs = pd.DataFrame({label: pd.Series([*values] * n).iloc[:n].array}, index=[f"c{i}" for i in range(n)])
    return ad.AnnData(x, obs=obs, var=pd.DataFrame(index=list(genes)))


TOGETHER = {
    "two alike": [cells(), cells()],
    "genes in another order": [cells(), cells(genes=HUMAN[::-1])],
    "CSC and dense": [cells(x=sp.csc_matrix(counts())), cells()],
    "a file without cells": [cells(), cells(n=0)],
    "a file of three cells": [cells(), cells(n=3)],
    "too few cells in all": [cells(n=9), cells(n=9)],
    "numbers and text as labels": [cells(values=[0, 1]), cells(values=["0", "1"])],
    "floats and numbers as labels": [cells(values=[0.0, 1.0]), cells(values=[0, 1])],
    "booleans and text as labels": [cells(values=[True, False]), cells(values=["True", "False"])],
    "two versions of gene ids": [cells(genes=[f"{g}.1" for g in HUMAN]), cells(genes=[f"{g}.2" for g in HUMAN])],
    "a repeated gene": [cells(), cells(genes=[*HUMAN[:-1], HUMAN[0]])],
    "log-transformed values in one": [cells(), cells(x=np.log1p(counts()))],
    "negative values in one": [cells(), cells(x=-counts())],
    "two organisms": [cells(), cells(genes=MOUSE)],
    "no label in one": [cells(), cells(label="celltype")],
    "no label in both": [cells(label="celltype"), cells(label="celltype")],
    "a part of the genes": [cells(), cells(genes=HUMAN[:4])],
    "other genes": [cells(genes=HUMAN[:3]), cells(genes=HUMAN[3:])],
    "symbols": [cells(genes=SYMBOLS), cells(genes=SYMBOLS)],
    "symbols in two cases": [cells(genes=SYMBOLS), cells(genes=[x.lower() for x in SYMBOLS])],
    "three files, one of symbols": [cells(), cells(), cells(genes=SYMBOLS)],
    "missing labels in one": [cells(), cells(values=["a", None])],
}


@pytest.mark.parametrize("files", TOGETHER.values(), ids=TOGETHER)
def test_what_validate_calls_usable_ingest_reads(tmp_path, files):
    for i, adata in enumerate(files):
        adata.write_h5ad(tmp_path / f"{i}.h5ad")
    found, said, opened = verdict(tmp_path, "cell_type")
    if isinstance(opened, str):
        assert any(e.errors for e in found), opened
        return
    rows = opened.store.read_ragged(np.arange(opened.store.shape[0]))
    assert not any(e.errors for e in found), said
    assert found[-1].facts["cells"] == opened.store.shape[0] == sum(a.n_obs for a in files)
    assert rows.counts.sum() == sum(a.X.sum() for a in files)
