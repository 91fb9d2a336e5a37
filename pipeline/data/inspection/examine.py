"""Inspects files and experiments for `scldm validate-data`: their contents, and all problems with them.

A path is an `.h5ad` file, a folder or pattern of them, a Cell Ranger output, or a SOMA experiment (folder or s3://).
"""

from __future__ import annotations

import glob
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from pipeline.config.ingest import MISSING_TEXT
from pipeline.config.paths.cell_files import is_h5ad, is_left_by_macos, is_tenx, left_by_macos, prefix_advice
from pipeline.data.entries import CountEntries
from pipeline.data.findings import Examined, Finding, error, warning
from pipeline.data.inspection.columns import obs_profile
from pipeline.data.inspection.h5ad import examine_h5ad
from pipeline.data.safety.formats import other_format
from pipeline.data.safety.hdf5 import open_problems, unsafe
from pipeline.data.tables import file_names, sample_names
from pipeline.data.validation.agreement import FileTables, agreement_findings, columns_of_ids
from pipeline.data.validation.cell_hashes import first_of_each
from pipeline.data.validation.counts import LEAVE_OUT_COPIES, CountAudit
from pipeline.data.validation.feature_types import genes_of_var
from pipeline.data.validation.gene_names import READ_OF_SOMA, GeneNames, gene_findings
from pipeline.data.validation.names import (
    cell_findings,
    class_counts,
    label_findings,
    size_findings,
    spelling_findings,
    suggested_labels,
)
from pipeline.data.validation.obs_sums import sum_findings
from scldm.data.user_table import TableError
from scldm.errors import InputError
from scldm.text import shown


@dataclass(frozen=True)
class Question:
    """What to inspect; plain data, so that it can be sent to a child process."""

    uri: str
    labels: tuple[str, ...] = ()
    layer: str | None = None
    measurement: str | None = None  # of a SOMA experiment
    gene_id: str | None = None
    genome: str | None = None  # of a Cell Ranger output that holds several
    counts: bool = True  # whether to read the values
    region: str | None = None
    anonymous: bool = False
    endpoint: str | None = None
    obs: str | None = None  # table that describes the cells of a Cell Ranger output
    missing_text: tuple[str, ...] = MISSING_TEXT  # as ingest.missing_text
    profile: bool = False  # whether to describe every column of obs and var


def examine(question: Question) -> list[Examined]:
    """Return one report per file or experiment, and one for all files together if there are several."""
    uri = question.uri
    if "://" in uri or is_experiment(Path(uri).expanduser()):
        return [_soma(question)]
    paths = _paths(uri)
    if not paths:
        nothing = Examined(uri, "path")
        absent = f"there is no such file, folder or pattern (from {Path.cwd()})"
        what = _without_cells(Path(uri).expanduser()) or absent
        known = other_format(Path(uri).expanduser())
        if advice := prefix_advice(Path(uri).expanduser()):
            what, _, remedy = advice.partition("; ")
            nothing.findings.append(error(what, remedy))
            return [nothing]
        remedy = "name .h5ad files, a folder of them, a Cell Ranger output, or a SOMA experiment"
        nothing.findings.append(error(f"this is {known.partition(': ')[0]}" if known else what,
                                      known.partition(": ")[2] if known else remedy))  # fmt: skip
        return [nothing]
    if question.obs is not None and len(paths) > 1 and all(is_tenx(path) for path in paths):
        return [_tenx(uri, paths, question)]  # the table describes the cells of all outputs
    if len(paths) == 1:
        one = _one(paths[0], question)
        one.findings += _skipped(uri)
        return [one]
    names = file_names(paths)
    found = [_one(path, question, name) for path, name in zip(paths, names, strict=True)]
    if question.gene_id is None:
        for i, column in _columns_of_ids(found).items():
            found[i] = _one(paths[i], replace(question, gene_id=column), names[i])
            found[i].facts["gene ids"] = f"var column {column}"
    for one in found:  # the number of cells counts for all files together
        alone = {f.what for f in size_findings(int(one.facts.get("cells", 0)))}
        one.findings[:] = [f for f in one.findings if f.what not in alone]
    whole = _together(uri, found, question.labels)
    whole.findings += _skipped(uri)
    return [*found, whole]


def _without_cells(path: Path) -> str | None:
    """Return what is wrong with a folder without cells; None if the path is no folder."""
    if not path.is_dir():
        return None
    names = sorted(shown(p.name) for p in path.iterdir())
    holds = (", ".join(names[:6]) + (", …" if len(names) > 6 else "")) or "nothing"
    return (
        "this folder holds no cells: no .h5ad, Cell Ranger output or SOMA experiment is in the folder (it holds "
        f"{holds})"
    )


def _skipped(uri: str) -> Iterator[Finding]:
    """Warn of files of a folder that are skipped by their names."""
    if skipped := left_by_macos(uri):
        yield warning(f"{len(skipped)} files are what macOS wrote beside other files", "they are skipped: delete them",
                      count=len(skipped), first=[p.name for p in skipped])  # fmt: skip


def is_experiment(path: Path) -> bool:
    return path.is_dir() and any((path / name).exists() for name in ("__group", "__tiledb_group.tdb"))


def _paths(uri: str) -> list[Path]:
    """Return the files and Cell Ranger folders that a path stands for."""
    path = Path(uri).expanduser()
    matches = [path] if path.exists() else sorted(map(Path, glob.glob(str(path))))
    found: list[Path] = []
    for match in matches:
        if match.is_dir() and not is_tenx(match):
            inside = (p for p in match.iterdir() if is_h5ad(p) or is_tenx(p))
            found += sorted(p for p in inside if not is_left_by_macos(p))
        elif match == path or not is_left_by_macos(match):
            found.append(match)
    return found


def _one(path: Path, q: Question, dataset_id: str | None = None) -> Examined:
    """Inspect one path.

    Args:
        dataset_id: Name of a file among several, which ingest writes into the obs column dataset_id.
    """
    if is_tenx(path):
        return _tenx(str(path), [path], q)
    return examine_h5ad(path, labels=q.labels, layer=q.layer, gene_id=q.gene_id, counts=q.counts, profile=q.profile,
                        missing_text=q.missing_text, dataset_id=dataset_id)  # fmt: skip


def _columns_of_ids(found: Sequence[Examined]) -> dict[int, str]:
    """Return the files, by position, whose gene ids are taken from a column, as ingest does."""
    variables = {str(i): one.var for i, one in enumerate(found) if one.var is not None}
    return {int(i): column for i, column in columns_of_ids(variables).items()}


def _together(uri: str, found: Sequence[Examined], labels: Sequence[str]) -> Examined:
    """Report problems that show only when all files are compared."""
    whole = Examined(uri, f"{len(found)} files")
    bad = [f.where for f in found if f.errors]
    whole.facts = {"cells": sum(int(f.facts.get("cells", 0)) for f in found)}
    if bad:
        whole.findings.append(error(f"{len(bad)} of {len(found)} files have errors", "fix them or leave them out",
                                    count=len(bad), first=bad))  # fmt: skip
    whole.findings += _of_one_kind(found)
    if all("cells" in f.facts for f in found):
        whole.findings += size_findings(whole.facts["cells"])
    tables = [
        FileTables(
            shown(Path(f.where).name), f.gene_ids, f.facts.get("obs columns", ()), f.facts.get("suggested labels", ())
        )
        for f in found
        if f.gene_ids is not None
    ]
    if len(tables) > 1:
        whole.findings += agreement_findings(tables, labels)
    whole.findings += _spelled_across(found)
    genes = {int(f.facts["genes"]) for f in found if "genes" in f.facts}
    if len(genes) > 1:
        sizes = ", ".join(f"{n:,}" for n in sorted(genes))
        what = f"files have different numbers of genes ({sizes})"
        whole.findings.append(
            warning(what, "genes are matched by id; set ingest.genes.presence to tell unmeasured from zero")
        )
    whole.findings += _shared_cells(found)
    return whole


def _of_one_kind(found: Sequence[Examined]) -> Iterator[Finding]:
    """Yield a finding if files of several kinds lie together: a job would read those of one, and leave the others."""
    if others := [f.where for f in found if f.kind != found[0].kind]:
        what = (
            f"{len(others)} of {len(found)} are of another kind than the first ({found[0].kind}), and a job reads one"
        )
        yield error(what, "name those of one kind, for example with a pattern: 'folder/*.h5ad'",
                    count=len(others), first=others)  # fmt: skip


def _shared_cells(found: Sequence[Examined]) -> Iterator[Finding]:
    """Yield a finding if cells of one file are in another one too; inside a file it was reported with the file."""
    read = [f for f in found if f.cell_hashes is not None]
    if len(read) < 2:
        return
    hashes = np.concatenate([f.cell_hashes for f in read])
    of = np.repeat(np.arange(len(read)), [len(f.cell_hashes) for f in read])
    first = first_of_each(hashes)
    again = np.flatnonzero((of[first] != of) & hashes.any(axis=1))
    if len(again):
        pairs = Counter(zip(of[first[again]].tolist(), of[again].tolist(), strict=True)).most_common()
        files = sample_names([Path(f.where) for f in read])
        names = [f"{n:,} of {files[b]} are in {files[a]}" for (a, b), n in pairs]
        what = f"{len(again):,} of {len(hashes):,} cells are in more than one file, with exactly the same counts"
        yield warning(what, f"ingest keeps copies on one side of the split; {LEAVE_OUT_COPIES}",
                      count=len(again), first=names)  # fmt: skip


# ---- 10x ---------------------------------------------------------------------------------------------------------
def _tenx(uri: str, paths: Sequence[Path], q: Question) -> Examined:
    from pipeline.config.job import TenxSource
    from pipeline.data.sources.tenx import read_10x

    found = Examined(uri, "10x")
    for path in paths:
        if path.is_file():
            found.findings += _unsafe_file(path)
    if found.errors:
        return found
    try:
        tables = read_10x(TenxSource(type="10x", path=uri, genome=q.genome, obs=q.obs))
        obs = tables.obs if q.obs is not None else tables.obs[["obs_id", "barcode", "dataset_id"]]
        _tables(found, obs, GeneNames(list(tables.var["feature_id"]), "10x"), q, "obs_id")
        found.findings += tables.left_out
        if q.counts:
            audit = _audit(tables.obs["obs_id"], tables.var["feature_id"])
            row = 0
            for chunk in tables.chunks():
                coo = chunk.tocoo()
                audit.add(CountEntries(coo.row.astype(np.int64) + row, coo.col.astype(np.int64), coo.data))
                row += chunk.shape[0]
            _finish(found, audit)
    except TableError as problem:
        found.findings.append(_finding(problem, "correct the table, and run this again"))
    except InputError as problem:
        found.findings.append(_finding(problem, "fix that, or copy or download the output again"))
    return found


def _unsafe_file(path: Path) -> Sequence[Finding]:
    import h5py

    if found := open_problems(path):
        return found
    with h5py.File(path) as file:
        return list(unsafe(file))


def _spelled_across(found: Sequence[Examined]) -> Iterator[Finding]:
    """Warn of classes that are spelled differently in different files; each file reports its own."""
    counts: dict[str, Counter[str]] = {}
    for one in found:
        for label, classes in one.facts.get("classes", {}).items():
            counts.setdefault(label, Counter()).update(classes)
    own = {f.what for one in found for f in one.findings}
    for label, classes in counts.items():
        yield from (f for f in spelling_findings(label, classes) if f.what not in own)


# ---- SOMA --------------------------------------------------------------------------------------------------------
def _soma(q: Question) -> Examined:
    from pipeline.config.job import SomaSource
    from pipeline.data.soma.names import locate_counts
    from pipeline.data.soma.store import SomaStore
    from pipeline.data.sources.open import soma_config

    found = Examined(q.uri, "SOMA")
    try:
        settings: dict[str, Any] = {"region": q.region, "anonymous": q.anonymous}
        if q.endpoint is not None:
            settings["s3"] = {"endpoint": q.endpoint, "addressing": "path"}
        source = SomaSource.model_validate({"type": "soma", "uri": q.uri, **settings})
        store = SomaStore(q.uri, soma_config(source), source.measurement, source.layer)
        store, _ = locate_counts(store, measurement=q.measurement, layer=q.layer)
        found.facts["counts"] = f"measurement {store.measurement}, layer {store.layer}"
        obs, var = store.obs(), store.var()
        name = next((c for c in ("obs_id", "soma_joinid") if c in obs), "soma_joinid")
        if q.gene_id is not None:
            found.findings.append(error(f"--gene-id {shown(q.gene_id)}: {READ_OF_SOMA}", "leave it out"))
        features = genes_of_var(var, "var")
        found.findings += features.findings()
        var = var[features.kept].reset_index(drop=True)
        column = next((c for c in ("feature_id", "var_id") if c in var), None)
        if column is None:
            columns = ", ".join(shown(c) for c in var.columns)
            found.findings.append(error(f"var has no feature_id (columns: {columns}): {READ_OF_SOMA}",
                                        "write the experiment again with the ids in a column feature_id"))  # fmt: skip
        ids = var[column or "soma_joinid"].astype(str)
        _tables(found, obs, GeneNames(list(ids), "SOMA", column, var), q, name)
        if q.counts:
            audit = _soma_counts(store, obs, ids, name, var["soma_joinid"].to_numpy())
            _finish(found, audit)
            if not features.left_out:  # obs has the sums over all features
                found.findings += sum_findings(obs, n_expressed=audit.per_cell, library_size=audit.sums)
    except InputError as problem:
        found.findings.append(_finding(problem, "give the address of an experiment"))
    except ValueError as problem:  # from pydantic: a setting
        found.findings.append(_finding(problem, "check the options"))
    return found


def _soma_counts(store: Any, obs: pd.DataFrame, ids: pd.Series, name: str, genes: np.ndarray) -> CountAudit:
    """Audit the counts by storage tiles; joinids may have gaps, so positions are looked up."""
    audit, cells = _audit(obs[name], ids), obs["soma_joinid"].to_numpy()
    lut = np.full(store.shape[1], -1, np.int32)
    lut[genes] = np.arange(len(genes))
    for start in range(0, len(cells), store.tile):
        block = cells[start : start + store.tile]
        rows = store.read_ragged(block, lut)
        at = start + np.repeat(np.arange(len(block)), np.diff(rows.indptr))
        audit.add(CountEntries(at, np.asarray(rows.genes, np.int64), rows.counts))
    return audit


# ---- shared ------------------------------------------------------------------------------------------------------
def _tables(found: Examined, obs: pd.DataFrame, genes: GeneNames, q: Question, name: str) -> None:
    names = obs[name].astype(str)
    found.gene_ids = [str(x) for x in genes.ids]
    shown_obs = obs.drop(columns=[name])
    found.facts |= {
        "cells": len(obs),
        "obs columns": list(shown_obs.columns),
        "suggested labels": suggested_labels(shown_obs, names),
        "classes": {c: class_counts(obs[c], q.missing_text) for c in q.labels if c in obs},
        "genes": len(genes.ids),
    }
    if q.profile:
        found.facts["profile"] = {"obs": obs_profile(shown_obs)}
    found.findings += [
        *cell_findings(names),
        *label_findings(shown_obs, q.labels, names, missing_text=q.missing_text, renamed=found.kind != "SOMA"),
        *gene_findings(genes),
    ]


def _audit(names: pd.Series, ids: pd.Series) -> CountAudit:
    def where(cell: int, gene: int) -> str:
        parts = [f"cell {names.iloc[cell]}"] if cell >= 0 else []
        return ", ".join(parts + ([f"gene {ids.iloc[gene]}"] if gene >= 0 else []))

    return CountAudit(len(names), list(ids), where)


def _finish(found: Examined, audit: CountAudit) -> None:
    found.facts |= {"stored values": audit.stored, "largest value": audit.largest, "values are": audit.guess()}
    found.findings += audit.findings([])
    found.cell_hashes = audit.hashes


def _finding(problem: Exception, remedy: str) -> Finding:
    text = " ".join(shown(line.strip(" -"), 1000) for line in str(problem).splitlines())
    what, _, own = text.rpartition("; ")  # errors of ours end with their remedy
    return error(what, own) if what else error(text, remedy)
