"""Cell Ranger outputs of every layout, against what scanpy reads from the same files; and what is refused."""

import gzip
import shutil
import subprocess
from pathlib import Path

import h5py
import numpy as np
import pandas as pd
import pytest
import scipy.io
import scipy.sparse as sp

from pipeline.config.job import TenxSource
from pipeline.data.inspection.examine import Question, examine
from pipeline.data.sources.tenx import find_outputs, read_10x
from pipeline.data.sources.tenx_files import open_tenx
from pipeline.data.tables import sample_names
from scldm.errors import InputError

EDGE = Path(__file__).resolve().parents[4].parent / "shared" / "data" / "edge" / "10x"
real = pytest.mark.skipif(not EDGE.is_dir(), reason="the real Cell Ranger outputs of ../shared/data are not here")


def source(path, **more):
    return TenxSource.model_validate({"type": "10x", "path": str(path), **more})


def dense(tables):
    return sp.vstack(list(tables.chunks())).toarray()


def write_folder(folder, counts, ids, *, barcodes=None, kinds=None, zipped=True):
    """A version 3 output; counts are cells x features."""
    folder.mkdir(parents=True)
    barcodes = barcodes or [f"CELL{i}-1" for i in range(len(counts))]
    kinds = kinds or ["Gene Expression"] * len(ids)
    scipy.io.mmwrite(folder / "matrix.mtx", sp.coo_matrix(np.asarray(counts).T), field="integer")
    (folder / "barcodes.tsv").write_text("".join(f"{b}\n" for b in barcodes))
    lines = [f"{i}\tname of {i}\t{k}\n" for i, k in zip(ids, kinds, strict=True)]
    (folder / "features.tsv").write_text("".join(lines))
    if zipped:
        for file in list(folder.iterdir()):
            with gzip.open(f"{file}.gz", "wb") as f:
                f.write(file.read_bytes())
            file.unlink()


@pytest.fixture
def two_samples(tmp_path):
    """S1 measured A, B, C; S2 measured C, D."""
    rng = np.random.default_rng(0)
    one, two = rng.poisson(2, (20, 3)), rng.poisson(2, (15, 2))
    write_folder(tmp_path / "run" / "S1" / "outs" / "filtered_feature_bc_matrix", one, ["A", "B", "C"])
    write_folder(tmp_path / "run" / "S2" / "outs" / "filtered_feature_bc_matrix", two, ["C", "D"], zipped=False)
    return tmp_path / "run", one, two


# ---- real files --------------------------------------------------------------------------------------------------
@real
@pytest.mark.parametrize(
    ("path", "genome"),
    [
        ("scanpy/1.2.0/filtered_gene_bc_matrices_h5.h5", None),
        ("scanpy/1.2.0/multiple_genomes.h5", "hg19_chr21"),
        ("scanpy/3.0.0/filtered_feature_bc_matrix.h5", None),
    ],
)
def test_an_h5_file_is_read_as_scanpy_reads_it(path, genome):
    import scanpy as sc

    expected = sc.read_10x_h5(EDGE / path, genome=genome, gex_only=True)
    tables = read_10x(source(EDGE / path, genome=genome), ["dataset_id"])
    np.testing.assert_array_equal(dense(tables), expected.X.toarray())
    assert list(tables.var["feature_id"]) == list(expected.var["gene_ids"])
    assert list(tables.var["feature_name"]) == _names(path, genome)
    assert list(tables.obs["barcode"]) == list(expected.obs_names)


def _names(path, genome):
    with h5py.File(EDGE / path) as f:
        if "matrix" not in f:
            return [x.decode() for x in f[genome or next(iter(f))]["gene_names"]]
        kinds = [x.decode() for x in f["matrix/features/feature_type"]]
        names = [x.decode() for x in f["matrix/features/name"]]
        return [n for n, k in zip(names, kinds, strict=True) if k == "Gene Expression"]


@real
@pytest.mark.parametrize(
    ("path", "n_cells", "n_genes", "left_out"),
    [
        ("scanpy/1.2.0/filtered_gene_bc_matrices", 12, 343, 0),
        ("scanpy/1.2.0/filtered_gene_bc_matrices/hg19_chr21", 12, 343, 0),
        ("scanpy/3.0.0/filtered_feature_bc_matrix", 1107, 507, 0),
        ("scanpy/int-ids", 5, 6, 0),
        ("monocle3_cr2.0/hg19", 80, 240, 0),
        ("monocle3_cr3.0/filtered_feature_bc_matrix", 5, 3, 2),
        ("scvi_pbmc10k_protein/filtered_feature_bc_matrix", 1024, 100, 17),
    ],
)
def test_a_folder_of_either_version_is_read_whole(path, n_cells, n_genes, left_out):
    tables = read_10x(source(EDGE / path), ["dataset_id"])
    x = dense(tables)
    assert x.shape == (len(tables.obs), len(tables.var)) == (n_cells, n_genes)
    assert x.sum() > 0
    notes = [n for n in tables.notes if "they are left out: the model is of gene expression" in n]
    assert bool(notes) == bool(left_out)
    assert all(f"({left_out} Antibody Capture)" in n for n in notes)


@real
def test_folder_and_h5_of_the_same_run_hold_the_same():
    folder = read_10x(source(EDGE / "scanpy/3.0.0/filtered_feature_bc_matrix"), ["dataset_id"])
    h5 = read_10x(source(EDGE / "scanpy/3.0.0/filtered_feature_bc_matrix.h5"), ["dataset_id"])
    np.testing.assert_array_equal(dense(folder), dense(h5))
    pd.testing.assert_frame_equal(folder.var, h5.var)


@real
def test_whole_numbers_as_ids_stay_names():
    tables = read_10x(source(EDGE / "scanpy/int-ids"), ["dataset_id"])
    assert tables.var["feature_id"].iloc[0] == "574405"
    assert tables.var["feature_name"].iloc[0] == "Pwwp4b"


@real
@pytest.mark.parametrize("genome", [None, "mm10"])
def test_a_file_of_several_genomes_asks_which(genome):
    with pytest.raises(InputError, match="hg19_chr21") as error:
        read_10x(source(EDGE / "scanpy/1.2.0/multiple_genomes.h5", genome=genome))
    assert "ingest.source.genome" in str(error.value)


@real
def test_an_archive_is_answered_with_how_to_unpack_it():
    with pytest.raises(InputError, match="unpack it first"):
        find_outputs(source(EDGE / "scvi_pbmc10k_protein/filtered_feature_bc_matrix.tar.gz"))


@real
def test_the_ingest_stage_takes_a_10x_folder(tmp_path):
    from types import SimpleNamespace

    from pipeline.config.context import StageContext
    from pipeline.config.job import IngestConfig
    from pipeline.core.manifest import Manifest
    from pipeline.data.ingest.dataset import IngestedDataset
    from pipeline.stages import ingest

    path = EDGE / "scvi_pbmc10k_protein" / "filtered_feature_bc_matrix"
    config = {"source": {"type": "10x", "path": str(path)}, "labels": ["dataset_id"]}
    context = StageContext(tmp_path, {}, 0, SimpleNamespace(), None)
    facts = ingest.run(IngestConfig.model_validate(config), context)
    data = IngestedDataset.open(Manifest("ingest", "v", str(tmp_path), {}, {}, facts, 0.0, 0.0))
    expected = dense(read_10x(source(path), ["dataset_id"]))
    found = {s: data.anndata(s) for s in ("train", "validation", "test")}
    for adata in found.values():
        np.testing.assert_array_equal(adata.X.toarray(), expected[adata.obs_names.astype(int)])
    assert sum(a.n_obs for a in found.values()) == (expected.sum(1) > 0).sum()
    assert facts["n_classes"] == {"dataset_id": 1}


# ---- many samples ------------------------------------------------------------------------------------------------
def test_samples_are_joined_by_gene_and_told_apart_by_their_paths(two_samples):
    folder, one, two = two_samples
    tables = read_10x(source(folder / "*/outs/filtered_feature_bc_matrix"), ["dataset_id"])
    assert list(tables.var["feature_id"]) == ["A", "B", "C", "D"]
    expected = np.zeros((35, 4))
    expected[:20, :3], expected[20:, 2:] = one, two
    np.testing.assert_array_equal(dense(tables), expected)
    assert tables.obs["dataset_id"].tolist() == ["S1"] * 20 + ["S2"] * 15
    assert tables.obs["obs_id"].iloc[20] == "S2:CELL0-1"
    assert tables.measured.measured.tolist() == [[True, True, True, False], [False, False, True, True]]
    np.testing.assert_array_equal(tables.measured.group, [0] * 20 + [1] * 15)
    assert "S2 lacks 2 of 4 genes." in tables.notes


def test_a_folder_of_outputs_is_its_samples(two_samples, tmp_path):
    folder, *_ = two_samples
    for s in ("S1", "S2"):
        shutil.copytree(folder / s / "outs" / "filtered_feature_bc_matrix", tmp_path / "flat" / s)
    assert [p.name for p in find_outputs(source(tmp_path / "flat"))] == ["S1", "S2"]


@pytest.mark.parametrize(
    ("paths", "names"),
    [
        (["/d/S1/outs/filtered_feature_bc_matrix"], ["S1"]),
        (["/d/S1/outs/filtered_feature_bc_matrix", "/d/S2/outs/filtered_feature_bc_matrix"], ["S1", "S2"]),
        (["/d/a/x", "/d/b/y"], ["a/x", "b/y"]),
        (["/d/x", "/d/x/y"], ["x", "x/y"]),
    ],
)
def test_names_of_samples_are_what_differs(paths, names):
    assert sample_names([Path(p) for p in paths]) == names


def test_a_table_brings_the_labels(two_samples, tmp_path):
    folder, *_ = two_samples
    rows = [("S1", f"CELL{i}-1", "T cell" if i < 9 else "B cell") for i in range(18)]
    rows += [("S2", f"CELL{i}-1", "NK") for i in range(15)] + [("S3", "CELL0-1", "NK")]
    table = tmp_path / "cells.csv"
    pd.DataFrame(rows, columns=["sample", "barcode", "kind"]).to_csv(table, index=False)
    described = source(folder / "*/outs/*", obs=str(table), columns={"cell_type": "kind"})
    tables = read_10x(described, ["cell_type"])
    labels = tables.obs["cell_type"]
    assert labels.iloc[:9].tolist() == ["T cell"] * 9
    assert labels.iloc[18:20].isna().all()
    assert labels.iloc[20:].tolist() == ["NK"] * 15
    assert any("33 of 35 cells are described" in n and "1 of its rows are of no cell" in n for n in tables.notes)


def test_tables_that_do_not_fit_are_explained(two_samples, tmp_path):
    folder, *_ = two_samples
    path = str(folder / "*/outs/*")
    good = pd.DataFrame({"sample": ["S1"], "barcode": ["CELL0-1"], "kind": ["x"]})
    for frame, more, words in [
        (good.drop(columns="sample"), {}, "no column sample"),
        (good.assign(barcode="CELL0"), {}, "no row of .* is about a cell"),
        (pd.concat([good, good]), {}, "rows of .* have the sample and barcode of another row"),
        (good, {"columns": {"cell_type": "kinds"}}, "no column 'kinds' .did you mean 'kind'"),
    ]:
        frame.to_csv(tmp_path / "t.csv", index=False)
        with pytest.raises(InputError, match=words):
            read_10x(source(path, obs=str(tmp_path / "t.csv"), **more))
    with pytest.raises(InputError, match="holds no cell_type: give a table with barcode and cell_type"):
        read_10x(source(path), ["cell_type"])
    with pytest.raises(InputError, match=r"no file .*nowhere.csv"):
        read_10x(source(path, obs=str(tmp_path / "nowhere.csv")))


def problem(path, table: str, tmp_path, **more) -> str:
    (tmp_path / "t.csv").write_text(table)
    with pytest.raises(InputError) as error:
        read_10x(source(path, obs=str(tmp_path / "t.csv"), **more))
    return str(error.value)


@pytest.fixture
def one_sample(tmp_path):
    write_folder(tmp_path / "S1", np.random.default_rng(0).poisson(2, (20, 3)), ["A", "B", "C"])
    return tmp_path / "S1"


def kinds(first: str = "", separator: str = ",") -> str:
    return "".join(f"{separator.join(row)}\n" for row in [(first, "kind"), *((f"CELL{i}-1", "x") for i in range(20))])


def test_barcodes_in_an_index_without_a_name_are_the_barcodes(one_sample, tmp_path):
    (tmp_path / "t.csv").write_text(kinds())
    (tmp_path / "excel.csv").write_text("\ufeff" + kinds("barcode", ";"))
    names = pd.Index([f"CELL{i}-1" for i in range(20)])
    pd.DataFrame({"kind": ["x"] * 20}, index=names).to_parquet(tmp_path / "t.parquet")
    for name in ("t.csv", "excel.csv", "t.parquet"):
        tables = read_10x(source(one_sample, obs=str(tmp_path / name)), ["kind"])
        assert tables.obs["kind"].tolist() == ["x"] * 20


def test_a_column_that_holds_the_barcodes_or_samples_is_named(one_sample, two_samples, tmp_path):
    said = problem(one_sample, kinds("cell"), tmp_path)
    assert said.endswith("cell holds such values: set ingest.source.columns: {barcode: cell}")
    assert (
        read_10x(source(one_sample, obs=str(tmp_path / "t.csv"), columns={"barcode": "cell"})).obs["kind"].notna().all()
    )
    assert problem(one_sample, "id,kind\nx,y\n", tmp_path).endswith(
        "add a column barcode that holds barcodes as CELL0-1"
    )
    path = str(two_samples[0] / "*/outs/*")
    said = problem(path, "barcode,run,kind\nCELL0-1,S2,x\n", tmp_path)
    assert "no column sample (columns: barcode, run, kind), and there are 2 samples: S1, S2" in said
    assert said.endswith("{sample: run}")
    said = problem(path, kinds("barcode"), tmp_path)
    assert said.endswith("2 samples: S1, S2; add a column sample that holds the name of each cell's sample")
    said = problem(path, "barcode,sample,kind\nCELL0-1,one,x\n", tmp_path)
    assert said.endswith("in the column sample write S1, S2")


def test_a_column_of_held_out_combinations_is_no_reason_to_train_without_labels(one_sample):
    where = "ingest.split.held_out.table: held.csv, row 1"
    with pytest.raises(InputError, match=r"row 1: a 10x output holds no dose: .* in ingest\.source\.obs$"):
        read_10x(source(one_sample), ["dose"], {"dose": where})


def test_a_cell_that_is_described_twice_is_named_with_its_rows(one_sample, tmp_path):
    said = problem(one_sample, "barcode,sample,kind\nCELL0-1,a,x\nCELL1-1,a,x\nCELL0-1,a,y\n", tmp_path)
    assert "t.csv have the barcode of another row (first: barcode CELL0-1 in rows 1, 3, which differ in kind)" in said
    assert said.endswith("keep one row for each cell, of the sample that is read")


def test_spellings_that_differ_by_space_are_one_class_and_a_note_says_so(one_sample, tmp_path):
    (tmp_path / "t.csv").write_text(kinds("barcode").replace("CELL0-1,x", "CELL0-1,x "))
    tables = read_10x(source(one_sample, obs=str(tmp_path / "t.csv")), ["kind"])
    assert set(tables.obs["kind"]) == {"x"}
    assert any("spellings are joined of 'x'" in note for note in tables.notes)


def test_a_fault_of_the_table_is_no_fault_of_the_output(one_sample, tmp_path):
    (tmp_path / "t.csv").write_text("barcode,kind\nCELL0-1,x\nCELL0-1,x\n")
    [found] = examine(Question(str(one_sample), obs=str(tmp_path / "t.csv")))
    assert [f.remedy for f in found.errors] == ["keep one row for each cell"]


# ---- damage ------------------------------------------------------------------------------------------------------
def write_h5(path, **changed):
    csc = sp.csc_matrix(np.array([[1, 0, 2], [0, 3, 0]]))  # 2 features x 3 cells
    fields = {"data": csc.data, "indices": csc.indices, "indptr": csc.indptr, "shape": [2, 3]}
    fields |= {"barcodes": np.array([b"A-1", b"B-1", b"C-1"])} | changed
    with h5py.File(path, "w") as f:
        group = f.create_group("matrix")
        for name, value in fields.items():
            group[name] = value
        kinds = {"id": [b"g1", b"g2"], "name": [b"n1", b"n2"], "feature_type": [b"Gene Expression"] * 2}
        for name, value in kinds.items():
            group[f"features/{name}"] = np.array(value)
    return path


def test_an_h5_without_genomes_is_read(tmp_path):
    tables = read_10x(source(write_h5(tmp_path / "a.h5")), ["dataset_id"])
    assert dense(tables).tolist() == [[1, 0], [0, 3], [2, 0]]


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"indptr": [0, 1, 2, 9]}, "indptr that does not run from 0 to 3"),
        ({"indptr": [0, 2, 1, 3]}, "indptr that does not run"),
        ({"indices": [0, 1, 7]}, "points at feature 7 of 2"),
        ({"indices": [0, 1]}, "3 values but 2 indices"),
        ({"shape": [2, 4]}, "says that it is 2 x 4"),
    ],
)
def test_a_damaged_h5_says_what_is_wrong(tmp_path, changed, words):
    path = write_h5(tmp_path / "a.h5", **changed)
    with pytest.raises((InputError, ValueError), match=words):
        list(open_tenx(path, None).chunks())


def test_damaged_folders_are_all_named_at_once(two_samples):
    folder, *_ = two_samples
    (folder / "S1" / "outs" / "filtered_feature_bc_matrix" / "barcodes.tsv.gz").unlink()
    features = folder / "S2" / "outs" / "filtered_feature_bc_matrix" / "features.tsv"
    features.write_text("C\nD\n")
    with pytest.raises(InputError) as error:
        read_10x(source(folder / "*/outs/*"))
    assert "has no barcodes.tsv (gzipped or not); it has features.tsv.gz, matrix.mtx.gz" in str(error.value)
    assert "features.tsv:1 must hold an id and a name" in str(error.value)


def test_files_that_do_not_belong_together_are_refused(two_samples):
    folder, *_ = two_samples
    place = folder / "S2" / "outs" / "filtered_feature_bc_matrix"
    with (place / "features.tsv").open("a") as f:
        f.write("E\tname of E\tGene Expression\n")
    tables = read_10x(source(place), ["dataset_id"])
    with pytest.raises(InputError, match="2 x 15, but there are 3 features and 15 barcodes"):
        list(tables.chunks())


def test_a_truncated_matrix_is_refused(two_samples):
    folder, *_ = two_samples
    matrix = folder / "S2" / "outs" / "filtered_feature_bc_matrix" / "matrix.mtx"
    matrix.write_text(matrix.read_text()[:-20])
    with pytest.raises(InputError, match="not a whole Matrix Market file"):
        list(read_10x(source(matrix.parent), ["dataset_id"]).chunks())


def test_nothing_there_is_said(tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match="no Cell Ranger output"):
        find_outputs(source(tmp_path / "empty"))
    with pytest.raises(InputError, match="no such file, folder or pattern"):
        find_outputs(source(tmp_path / "nowhere"))


@pytest.mark.parametrize("prefixes", [["GSM1_"], ["GSM1_a b_", "GSM2_", "S3."]], ids=["one sample", "three samples"])
def test_the_advice_for_files_that_geo_renamed_makes_them_readable(tmp_path, prefixes):
    folder = tmp_path / "GSE 1"
    folder.mkdir()
    counts = np.random.default_rng(0).poisson(1.0, (30, 4))
    for prefix in prefixes:
        write_folder(tmp_path / f"of {prefix}", counts, [f"ENSG{i:011d}" for i in range(4)])
        for file in (tmp_path / f"of {prefix}").iterdir():
            file.rename(folder / f"{prefix}{file.name}")
    [looked] = examine(Question(str(folder)))
    with pytest.raises(InputError) as refused:
        read_10x(source(folder))
    command = str(refused.value).partition("Cell Ranger names them: ")[2]
    assert command in looked.errors[0].message
    subprocess.run(command, shell=True, check=True)
    assert (dense(read_10x(source(folder))) == np.tile(counts, (len(prefixes), 1))).all()
