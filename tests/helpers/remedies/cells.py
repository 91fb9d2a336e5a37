"""Advice about cells: where the counts, the names of genes and the labels are, and how the cells are split."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import anndata as ad
import numpy as np
import pandas as pd
import scipy.sparse as sp

from helpers.files import faulty_counts, faulty_tables, faulty_tenx
from helpers.files.faulty_experiments import experiment
from helpers.files.h5ad_cases import G, N, counts, look, save, told
from helpers.remedies.follow import Case, done, follows, ingest, message, named, other, pipeline_on, refused, setting
from pipeline.config.io.loader import load_job

IDS = faulty_tables.IDS


def of_file(case: Case, path: Path, **ingest_settings: Any) -> Path:
    return pipeline_on(case, {"type": "h5ad", "path": str(path)}, **ingest_settings)


def of_tenx(case: Case, path: Path, **more: Any) -> Path:
    return pipeline_on(case, {"type": "10x", "path": str(path), **more})


def of_experiment(case: Case, path: Path, **more: Any) -> Path:
    return pipeline_on(case, {"type": "soma", "uri": str(path), **more})


# ---- where the counts are ------------------------------------------------------------------------------------------
@follows(
    "pipeline/data/validation/checks.py: this file has some elsewhere: set ingest.source.",
    "pipeline/data/validation/counts.py: this file has counts elsewhere: set ingest.source.",
)
def counts_are_in_a_layer(case: Case) -> None:
    path = faulty_counts.no_counts_but_elsewhere(case.folder)
    job = of_file(case, path)
    assert ingest(job, setting(message(ingest, job), "ingest.source.layer"))["n_genes"] == G
    assert ingest(job, setting(told(look(path)), "ingest.source.layer"))["n_genes"] == G


@follows(
    "pipeline/data/sources/h5ad.py: ; set ingest.source.{}",
    "pipeline/data/inspection/h5ad.py: set ingest.source.{}",
)
def a_file_without_x_has_counts_elsewhere(case: Case) -> None:
    job = of_file(case, faulty_counts.without_x(layer=True)(case.folder))
    assert ingest(job, setting(message(ingest, job), "ingest.source.layer"))["n_genes"] == G
    path = faulty_counts.without_x(raw=True)(case.folder)
    assert ingest(job, setting(told(look(path)), "ingest.source.layer"))["n_genes"] == G


@follows("pipeline/data/soma/names.py: set ingest.source.{} to the one with raw counts")
def an_experiment_has_another_measurement(case: Case) -> None:
    job = of_experiment(case, experiment(case.folder), measurement="protein")
    said = message(ingest, job)
    assert ingest(job, f"{named(said, 'ingest.source.measurement')}=RNA")["n_genes"] == G


@follows("pipeline/data/ingest/statistics.py: name the layer of raw counts in ingest.source.layer")
def a_layer_of_an_experiment_holds_no_counts(case: Case) -> None:
    from pipeline.data.soma.write import write_experiment

    path = experiment(case.folder)
    obs = pd.DataFrame({"obs_id": [f"c{i}" for i in range(N)], "cell_type": pd.Categorical(["a", "b"] * 20)})
    var = pd.DataFrame({"feature_id": IDS, "feature_name": IDS, "feature_length": 0})
    write_experiment(case.folder / "logs", obs, var, [sp.csr_matrix(np.log1p(counts()))])
    shutil.copytree(path / "ms/RNA/X/raw", case.folder / "kept")
    shutil.rmtree(path / "ms/RNA/X/raw")
    shutil.copytree(case.folder / "logs/ms/RNA/X/raw", path / "ms/RNA/X/raw")
    job = of_experiment(case, path)
    said = message(ingest, job)
    # The experiment has one layer, so the next error is that there is no other.
    after = other(said, message(ingest, job, f"{named(said, 'ingest.source.layer')}=counts"))
    assert "has no layer 'counts'" in after


@follows("pipeline/data/safety/h5ad_structure.py: a Cell Ranger file is read with ingest.source: {type: 10x, …}")
def a_cell_ranger_file_is_named_as_h5ad(case: Case) -> None:
    path = faulty_tenx.file(case.folder).rename(case.folder / "cells.h5ad")
    job = of_file(case, path, labels=[])
    said = message(ingest, job)
    assert "ingest.source: {type: 10x, …}" in said
    found = path.rename(case.folder / "cells.h5")
    assert ingest(job, f"ingest.source={{type: 10x, path: {found}}}")["n_genes"] == G


@follows("pipeline/data/sources/open.py: region, anonymous and s3 are for s3:// addresses")
def a_local_experiment_needs_no_region(case: Case) -> None:
    job = of_experiment(case, experiment(case.folder), region="us-west-2")
    assert "drop them" in message(ingest, job)
    assert ingest(job, "ingest.source.region=null")["n_genes"] == G


# ---- names of genes ------------------------------------------------------------------------------------------------
@follows(
    "pipeline/data/validation/gene_names.py: name a var column of unique ids{} in ingest.source.gene_id",
    "pipeline/data/validation/gene_names.py: in ingest.source.gene_id, or leave those genes out",
)
def ids_are_in_a_column(case: Case) -> None:
    path = faulty_tables.genes(["GAPDH", "GAPDH", *faulty_tables.SYMBOLS[2:]], ensembl=IDS)(case.folder)
    job = of_file(case, path)
    for said in (message(ingest, job), told(look(path))):
        assert ingest(job, f"{named(said, 'ingest.source.gene_id')}=ensembl")["n_genes"] == G
    path = faulty_tables.genes(["", *faulty_tables.SYMBOLS[1:]], ensembl=IDS)(case.folder)
    said = message(ingest, job)
    assert "1 genes have no id" in said
    assert ingest(job, f"{named(said, 'ingest.source.gene_id')}=ensembl")["n_genes"] == G


@follows("pipeline/data/validation/gene_names.py: : set ingest.source.gene_id: {}")
def symbols_stand_beside_ids(case: Case) -> None:
    path = faulty_tables.genes(faulty_tables.SYMBOLS, ensembl=IDS)(case.folder)
    said = told(look(path))
    assert ingest(of_file(case, path), setting(said, "ingest.source.gene_id"))["n_genes"] == G
    assert "Ensembl" not in told(look(path, gene_id=setting(said, "ingest.source.gene_id").partition("=")[2]))


def two_files(folder: Path, other_ids: list[str], **var: Any) -> Path:
    """Two files of the usual cells; the genes of the second have other names."""
    for name, ids in (("a", IDS), ("b", other_ids)):
        path = save(folder / f"{name}.h5ad", genes=ids, names=[f"{name}{i}" for i in range(N)])
        cells = ad.read_h5ad(path)
        cells.var = cells.var.assign(**(var if name == "b" else dict.fromkeys(var, IDS)))
        cells.write_h5ad(path)
    return folder


def genes_of(job: Path, setting: str) -> list[str]:
    """Ids of the genes of several files that are read together; to read their counts imports lightning."""
    from pipeline.data.sources.h5ad import read_h5ad

    loaded: Any = load_job(job, [setting])
    return list(read_h5ad(loaded.ingest.source, []).var["feature_id"])


@follows("pipeline/data/validation/agreement.py: name a column of Ensembl ids that all files have")
def files_name_genes_differently(case: Case) -> None:
    # Two columns of ids: which one is meant is for the user to say.
    path = two_files(case.folder, faulty_tables.SYMBOLS, ensembl=IDS, older=IDS)
    job = of_file(case, path)
    said = message(ingest, job)
    assert genes_of(job, f"{named(said, 'ingest.source.gene_id')}=ensembl") == IDS


@follows("pipeline/data/validation/agreement.py: check what names them, and ingest.source.gene_id")
def files_share_no_gene(case: Case) -> None:
    path = two_files(case.folder, [f"ENSG{i + 500:011d}" for i in range(G)], ensembl=IDS)
    job = of_file(case, path)
    said = message(ingest, job)
    assert genes_of(job, f"{named(said, 'ingest.source.gene_id')}=ensembl") == IDS


# ---- vocabularies --------------------------------------------------------------------------------------------------
@follows("pipeline/data/ingest/genes.py: try ingest.genes.match: {}, or raise max_missing")
def a_vocabulary_of_symbols(case: Case) -> None:
    path = faulty_tables.genes(IDS, feature_name=faulty_tables.SYMBOLS)(case.folder)
    (case.folder / "genes.txt").write_text("\n".join(["GAPDH", "ACTB", "CD3D", "NOT1", "NOT2"]))
    job = of_file(case, path, genes={"vocabulary": "genes.txt"})
    job_settings = ["ingest.source.gene_name=feature_name"]
    said = message(ingest, job, *job_settings)
    job_settings.append(setting(said, "ingest.genes.match"))
    after = other(said, message(ingest, job, *job_settings))
    facts = ingest(job, *job_settings, f"{named(after, 'ingest.genes.max_missing')}=0.5")
    assert facts["genes"]["matched"] == 3


@follows("pipeline/data/ingest/genes.py: ; or set ingest.genes.vocabulary=source")
def a_vocabulary_that_is_none(case: Case) -> None:
    (case.folder / "genes.json").write_text("{")
    job = of_file(case, save(case.folder / "a.h5ad"), genes={"vocabulary": "genes.json"})
    said = message(ingest, job)
    assert ingest(job, setting(said.partition("; or set ")[2], "ingest.genes.vocabulary"))["n_genes"] == G


@follows("pipeline/config/ingest.py: drop {}, or set vocabulary: source")
def a_vocabulary_says_which_genes_there_are(case: Case) -> None:
    (case.folder / "genes.txt").write_text("\n".join(IDS))
    path = save(case.folder / "a.h5ad")
    job = of_file(case, path, genes={"vocabulary": "genes.txt", "min_cells": 1})
    said = refused("validate", job)
    done("validate", job, f"ingest.genes.{setting(said, 'vocabulary')}")
    assert "drop min_cells" in said
    done("validate", job, "ingest.genes.min_cells=0")


@follows("pipeline/data/ingest/genes.py: taken as zeros, which ingest.genes.presence=true fixes")
def genes_of_a_vocabulary_were_not_measured(case: Case) -> None:
    (case.folder / "genes.txt").write_text("\n".join([*IDS, "ENSG00000000099"]))
    job = of_file(case, save(case.folder / "a.h5ad"), genes={"vocabulary": "genes.txt"})
    said = "\n".join(ingest(job)["notes"])
    notes = "\n".join(ingest(job, setting(said, "ingest.genes.presence"))["notes"])
    assert "left out of the likelihood" in notes


@follows(
    "pipeline/data/ingest/measured.py: ingest.genes.presence=true leaves them out instead",
    "pipeline/data/inspection/examine.py: set ingest.genes.presence to tell unmeasured from zero",
)
def samples_measured_different_genes(case: Case) -> None:
    for sample, last in (("s1", IDS[-1]), ("s2", "ENSG00000000099")):
        (case.folder / sample).mkdir()
        path = faulty_tenx.swapped("matrix/features/id", np.array([*IDS[:-1], last], "S"))(case.folder / sample)
        path.rename(case.folder / f"{sample}.h5")
    job = of_tenx(case, case.folder)
    said = "\n".join(ingest(job, "ingest.labels=[dataset_id]")["notes"])
    facts = ingest(job, "ingest.labels=[dataset_id]", setting(said, "ingest.genes.presence"))
    assert facts["presence_groups"] == 2
    case.read_here()
    (case.folder / "s2.h5").unlink()
    path = faulty_tenx.swapped("matrix/features/feature_type", np.array(["Gene Expression"] * 5 + ["Other"], "S"))
    path(case.folder).rename(case.folder / "s2.h5")
    named(done("validate-data", case.folder), "ingest.genes.presence")


@follows("pipeline/data/validation/counts.py: ingest.genes.min_cells: 1 leaves them out")
def genes_are_in_no_cell(case: Case) -> None:
    path = faulty_counts.cells(faulty_counts.empty_genes)(case.folder)
    assert ingest(of_file(case, path), setting(told(look(path)), "ingest.genes.min_cells"))["n_genes"] == G - 2


# ---- labels --------------------------------------------------------------------------------------------------------
@follows("pipeline/data/validation/names.py: leave them out with ingest.missing_label: drop, or label them")
def cells_have_no_label(case: Case) -> None:
    path = save(case.folder / "a.h5ad", cell_type=["a", None, "b", "b"] * 10)
    job = of_file(case, path)
    assert sum(ingest(job, setting(message(ingest, job), "ingest.missing_label"))["n_cells"].values()) == 30


@follows("pipeline/data/validation/names.py: keeps texts as classes")
def a_class_is_called_nan(case: Case) -> None:
    path = save(case.folder / "a.h5ad", cell_type=["a", "nan"] * 20)
    job = of_file(case, path)
    said = message(ingest, job)
    assert sum(ingest(job, setting(said, "ingest.missing_text"))["n_cells"].values()) == N
    words = told(look(path, "cell_type")).partition("--missing-text ")[2]
    assert words.startswith('""')
    case.read_here()
    done("validate-data", path, "--label", "cell_type", "--missing-text", "")


@follows("pipeline/data/validation/names.py: name them in ingest.missing_text")
def a_class_is_named_like_a_missing_value(case: Case) -> None:
    path = save(case.folder / "a.h5ad", cell_type=["a", "NA"] * 20)
    said = told(look(path, "cell_type"))
    after = message(ingest, of_file(case, path), f"{named(said, 'ingest.missing_text')}=[NA]")
    assert "20 of 40 cells have no cell_type" in after


@follows("pipeline/data/validation/names.py: or map it with ingest.source.columns")
def a_label_has_another_name(case: Case) -> None:
    job = of_file(case, save(case.folder / "a.h5ad", louvain=["x", "y"] * 20), labels=["cluster"])
    said = message(ingest, job)
    mapped = setting(said, "ingest.source.columns").replace("<column of the file>", "louvain")
    assert ingest(job, mapped)["label_counts"].keys() == {"cluster"}
    assert ingest(job, f"{named(said, 'ingest.labels')}=[louvain]")["label_counts"].keys() == {"louvain"}


@follows("pipeline/data/validation/names.py: name one in ingest.labels{}")
def a_label_of_an_experiment_has_another_name(case: Case) -> None:
    """Columns of an experiment are read as they are called: there is no setting that renames them."""
    case.read_here()
    path = experiment(case.folder)
    said = refused("validate-data", path, "--label", "cluster")
    assert "ingest.source.columns" not in said
    facts = ingest(of_experiment(case, path), f"{named(said, 'ingest.labels')}=[cell_type]")
    assert facts["label_counts"].keys() == {"cell_type"}


@follows("pipeline/data/tables.py: read them under another name with ingest.source.columns")
def a_label_is_called_as_soma_calls_its_own(case: Case) -> None:
    job = of_file(case, save(case.folder / "a.h5ad", soma_type=["x", "y"] * 20), labels=["soma_type"])
    said = setting(message(ingest, job), "ingest.source.columns")
    new = said.partition("{")[2].partition(":")[0]
    assert ingest(job, said, f"ingest.labels=[{new}]")["label_counts"].keys() == {new}


@follows("pipeline/config/ingest.py: read it under another name, for example my_{}")
def a_label_is_called_as_a_column_of_requests(case: Case) -> None:
    job = of_file(case, save(case.folder / "a.h5ad", n_cells=["x", "y"] * 20), labels=["n_cells"])
    said = setting(refused("validate", job), "ingest.source.columns")
    new = said.partition("{")[2].partition(":")[0]
    assert ingest(job, said, f"ingest.labels=[{new}]")["label_counts"].keys() == {new}
    in_place = refused("validate", job, f"ingest.source={{type: soma, uri: '{case.folder}'}}")
    assert "ingest.source.columns" not in in_place  # columns of an experiment are read as they are called


# ---- labels whose classes are values -------------------------------------------------------------------------------
ALL_TRAIN = {"validation": 0, "test": 0}


def of_dose(case: Case, dose: Any, **values: Any) -> Path:
    path = save(case.folder / "a.h5ad", dose=dose)
    return of_file(case, path, labels=["dose"], label_values={"dose": {"type": "number", **values}}, split=ALL_TRAIN)


@follows("pipeline/data/ingest/label_values.py: is a number, and {} of its values are none")
def a_number_holds_text(case: Case) -> None:
    job = of_dose(case, ["vehicle", "1", "2", "3"] * 10)
    said = message(ingest, job)
    assert ingest(job, setting(said, "ingest.label_values.dose.zero"))["n_classes"] == {"dose": 4}
    assert ingest(job, f"{named(said, 'ingest.label_values')}={{}}")["n_classes"] == {"dose": 4}


@follows("pipeline/data/ingest/label_values.py: {}: {}; leave the label out of ingest.label_values: it is classes then")
def a_number_has_one_value(case: Case) -> None:
    job = of_dose(case, [1.0] * N)
    said = message(ingest, job)
    assert ingest(job, f"{named(said, 'ingest.label_values')}={{}}")["n_classes"] == {"dose": 1}


@follows("pipeline/data/validation/names.py: or make it a number with ingest.label_values.{}.type=number")
def a_label_holds_measurements(case: Case) -> None:
    path = save(case.folder / "a.h5ad", age=np.linspace(0.5, 80, N))
    job = of_file(case, path, labels=["age"], split=ALL_TRAIN)
    assert ingest(job, setting(message(ingest, job), "ingest.label_values.age.type"))["n_classes"] == {"age": N}


@follows("pipeline/cli/init/labels.py: taken as a number{}: {}; ingest.label_values={} makes it classes")
def a_number_is_meant_as_classes(case: Case) -> None:
    case.read_here()
    path = save(case.folder / "a.h5ad", dose=[0.5, 1.0] * (N // 2))
    said = done("init", path, "--label", "dose", "-o", case.folder / "mine.yaml")
    job = case.folder / "mine.yaml"
    assert "label_values" in ingest(job)
    assert "label_values" not in ingest(job, setting(said, "ingest.label_values"))


# ---- copies, filters, split ----------------------------------------------------------------------------------------
@follows("pipeline/data/validation/counts.py: write is_primary_data: False into obs for them and set ingest.cells.")
def cells_occur_twice(case: Case) -> None:
    x = np.random.default_rng(0).poisson(3.0, (N, 30)).astype(np.float32)
    x[20:] = x[:20]
    path = save(case.folder / "a.h5ad", x=sp.csr_matrix(x))
    job = of_file(case, path, split={"validation": 0, "test": 0})
    facts = ingest(job)
    assert facts["copied_cells"] == 20
    save(path, x=sp.csr_matrix(x), is_primary_data=[True] * 20 + [False] * 20)
    for said in ("\n".join(facts["notes"]), told(look(path))):
        assert "write is_primary_data: False into obs" in said
        facts = ingest(job, setting(said, "ingest.cells.is_primary_data"))
        assert "copied_cells" not in facts
        assert sum(facts["n_cells"].values()) == 20


@follows("pipeline/stages/ingest.py: (of ingest.cells and ingest.obs_filter) leaves no cells; loosen it")
def a_filter_leaves_no_cells(case: Case) -> None:
    job = of_file(case, save(case.folder / "a.h5ad"), obs_filter="cell_type == 'c'")
    said = message(ingest, job)
    assert ingest(job, f"{named(said, 'ingest.obs_filter')}=null")["n_genes"] == G


@follows("pipeline/data/ingest/filters.py: the Census has one experiment for each: ingest.source.organism")
def the_organism_is_a_setting_of_the_census(case: Case) -> None:
    job = of_file(case, save(case.folder / "a.h5ad"), cells={"organism": "Mus musculus"})
    named(message(ingest, job), "ingest.source.organism")
    census = pipeline_on(case, {"type": "census", "version": "2025-01-30"})
    done("validate", census, "ingest.source.organism=mus_musculus")


@follows(
    "pipeline/data/ingest/split.py: change ingest.split.salt",
    "pipeline/data/ingest/split.py: , or set ingest.split.by: cell",
)
def donors_are_too_few_to_split(case: Case) -> None:
    job = of_file(case, save(case.folder / "a.h5ad", donor_id="d1"), split={"by": "donor_id"})
    said = message(ingest, job)
    assert ingest(job, setting(said, "ingest.split.by"))["n_cells"]["train"] < N
    assert "raise ingest.split.validation and ingest.split.test, or set 0" in said
    assert ingest(job, "ingest.split.validation=0", "ingest.split.test=0")["n_cells"]["train"] == N
    named(said, "ingest.split.salt")


@follows("pipeline/data/ingest/dataset.py: set ingest.split.{} above 0 and ingest again")
def a_split_has_no_cells(case: Case) -> None:
    from pipeline.data.ingest.dataset import IngestedDataset

    job = of_file(case, save(case.folder / "a.h5ad"), split={"test": 0})
    facts = ingest(job)
    [folder] = case.folder.glob("ingest-*")
    said = message(IngestedDataset(folder, facts).composition, "test")
    facts = ingest(job, f"{named(said, 'ingest.split.test')}=0.2")
    [again] = set(case.folder.glob("ingest-*")) - {folder}
    assert len(IngestedDataset(again, facts).composition("test"))


@follows("pipeline/data/loading/cache_writer.py: name a folder on a larger disk (ingest.cache=")
def the_disk_is_too_small_for_a_cache(case: Case) -> None:
    from pipeline.data.loading import cache_writer

    job = of_file(case, save(case.folder / "a.h5ad"), cache=True)
    with case.patch.context() as patch:
        patch.setattr(cache_writer, "SPARE_BYTES", 1 << 60)
        said = message(ingest, job)
    advice = said.partition("name a folder on a larger disk")[2]
    larger = setting(advice, "ingest.cache").replace("/large/disk", str(case.folder))
    assert ingest(job, larger)["cache"]
    assert (case.folder / "cache").is_dir()
    assert "cache" not in ingest(job, setting(said.partition("stream from SOMA")[2], "ingest.cache"))


# ---- Cell Ranger ---------------------------------------------------------------------------------------------------
@follows(
    "pipeline/data/sources/tenx.py: in ingest.source.obs{}",
    "pipeline/data/sources/tenx.py: , or train without (ingest.labels=[] or [dataset_id], which is the sample)",
)
def an_output_has_no_labels(case: Case) -> None:
    job = of_tenx(case, faulty_tenx.with_table(["a", "b"])(case.folder))
    said = message(ingest, job)
    assert ingest(job, setting(said, "ingest.labels"))["label_counts"] == {}
    assert ingest(job, "ingest.labels=[dataset_id]")["label_counts"].keys() == {"dataset_id"}
    table = f"{named(said, 'ingest.source.obs')}={case.folder / 'cells.csv'}"
    assert ingest(job, table)["label_counts"].keys() == {"cell_type"}


@follows("pipeline/data/sources/tenx.py: ingest.source.columns renames columns of ingest.source.obs, which is not set")
def columns_of_a_table_that_is_not_named(case: Case) -> None:
    path = faulty_tenx.with_table(["a", "b"])(case.folder)
    job = of_tenx(case, path, columns={"kind": "cell_type"})
    said = message(ingest, job)
    settings = [f"{named(said, 'ingest.source.obs')}={case.folder / 'cells.csv'}", "ingest.labels=[kind]"]
    assert ingest(job, *settings)["label_counts"].keys() == {"kind"}


@follows(
    "pipeline/data/sources/tenx_obs.py: holds such values: set ingest.source.columns",
    "pipeline/data/sources/tenx_obs.py: holds such barcodes: set ingest.source.columns",
)
def another_column_holds_the_barcodes(case: Case) -> None:
    path = faulty_tenx.with_table(["a", "b"])(case.folder)
    table = case.folder / "cells.csv"
    text = table.read_text()
    job = of_tenx(case, path, obs=str(table))
    for other_names in (text.replace("barcode", "cell", 1), _twice_named(text)):
        table.write_text(other_names)
        renamed = setting(message(ingest, job), "ingest.source.columns")
        assert ingest(job, renamed)["label_counts"].keys() == {"cell_type"}


def _twice_named(text: str) -> str:
    """The table with barcodes in a column `cell`, and other names of the cells in a column `barcode`."""
    header, *rows = text.replace("barcode", "cell", 1).splitlines()
    return "\n".join([f"{header},barcode", *(f"{row},name {i}" for i, row in enumerate(rows))])


@follows(
    "pipeline/data/sources/tenx.py: set ingest.source.genome to one of",
    "pipeline/data/sources/tenx.py: has no genome {} (ingest.source.genome)",
)
def an_output_of_several_genomes(case: Case) -> None:
    genomes = np.array(["GRCh38"] * 4 + ["mm10"] * 2, "S")
    path = faulty_tenx.swapped("matrix/features/genome", genomes)(case.folder)
    job = of_tenx(case, path)
    labels = "ingest.labels=[]"
    said = message(ingest, job, labels)
    name = named(said, "ingest.source.genome")
    first = said.partition("to one of ")[2].split(",")[0]
    assert ingest(job, labels, f"{name}={first}")["n_genes"] == 4
    wrong = message(ingest, job, labels, f"{name}=hg19")
    assert ingest(job, labels, f"{named(wrong, name)}=mm10", "ingest.split.validation=0")["n_genes"] == 2


@follows("pipeline/data/validation/names.py: name another label in ingest.labels")
def no_cell_has_a_value_of_the_label(case: Case) -> None:
    path = save(case.folder / "a.h5ad", empty=pd.Categorical([None] * N, categories=["x"]))
    job = of_file(case, path, labels=["empty"])
    said = message(ingest, job)
    assert ingest(job, f"{named(said, 'ingest.labels')}=[cell_type]")["label_counts"].keys() == {"cell_type"}


@follows(
    "pipeline/data/validation/gene_names.py: leave them out with ingest.genes.value_filter, or write the experiment"
)
def genes_of_an_experiment_occur_twice(case: Case) -> None:
    from pipeline.data.soma.write import write_experiment

    obs = pd.DataFrame({"obs_id": [f"c{i}" for i in range(N)], "cell_type": pd.Categorical(["a", "b"] * 20)})
    ids = [f"ENSG{max(i, 1):011d}" for i in range(G)]
    names = ["copy", *(f"g{i}" for i in range(1, G))]
    var = pd.DataFrame({"feature_id": ids, "feature_name": names, "feature_length": 0})
    write_experiment(case.folder / "soma", obs, var, [sp.csr_matrix(counts())], tile=16)
    job = of_experiment(case, case.folder / "soma")
    said = message(ingest, job)
    left = ingest(job, f"""{named(said, "ingest.genes.value_filter")}=feature_name != 'copy'""")
    assert left["n_genes"] == G - 1


@follows("pipeline/cli/init/labels.py: --label {}: {}; {}")
def init_is_asked_for_a_label_with_a_name_of_soma(case: Case) -> None:
    case.read_here()
    path = save(case.folder / "a.h5ad", soma_type=["x", "y"] * 20)
    said = refused("init", path, "--label", "soma_type")
    job = of_file(case, path, labels=["soma_type"])
    columns = setting(said, "ingest.source.columns")
    new = columns.partition("{")[2].partition(":")[0]
    assert ingest(job, columns, f"ingest.labels=[{new}]")["label_counts"].keys() == {new}


@follows(
    "pipeline/data/ingest/replay.py: has no cells under ingest.replay.cells; loosen it",
    "pipeline/data/ingest/replay.py: set at most ingest.replay.share={}",
    "pipeline/data/ingest/replay.py: cells, or set ingest.replay=null",
    "pipeline/data/ingest/replay.py: or read one under another name (ingest.source.columns)",
)
def old_cells_do_not_fit(case: Case) -> None:
    def file(name: str, doses: list[object]) -> dict[str, str]:
        obs = pd.DataFrame(
            {"cell_type": ["a", "b"] * 20, "dose": np.resize(doses, N)}, index=[f"{name}{i}" for i in range(N)]
        )
        cells = ad.AnnData(sp.csr_matrix(counts()), obs=obs, var=pd.DataFrame(index=IDS))
        cells.write_h5ad(case.folder / f"{name}.h5ad")
        return {"type": "h5ad", "path": str(case.folder / f"{name}.h5ad")}

    new, old = file("new", [1.0, 2.0]), file("old", ["low", "high"])
    where = {"where": {"cell_type": "a", "dose": "high"}}
    job = pipeline_on(case, new, replay={"source": old, "cells": where, "share": 0.1})
    said = message(ingest, job)
    after = other(said, message(ingest, job, f"{named(said, 'ingest.replay.cells')}={{}}", "ingest.replay.share=0.9"))
    other(after, message(ingest, job, "ingest.replay.cells={}", setting(after, "ingest.replay.share"), *BOTH_LABELS))
    said = message(ingest, job, "ingest.replay.cells={}", "ingest.replay.share=0.2", *BOTH_LABELS)
    columns = f"{named(said, 'ingest.source.columns')}={{amount: dose}}"
    ingest(job, "ingest.replay.cells={}", "ingest.replay.share=0.2", columns, "ingest.labels=[cell_type, amount]")
    job = pipeline_on(case, new, replay={"source": file("old", [1.0]), "share": 0.2})
    held_out = "ingest.split.held_out.combinations=[{dose: 1.0}]"
    said = message(ingest, job, held_out)
    ingest(job, held_out, setting(said, "ingest.replay"))


BOTH_LABELS = ["ingest.labels=[cell_type, dose]"]
