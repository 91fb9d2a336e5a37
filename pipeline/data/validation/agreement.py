"""Compares files that are read together: kinds of gene ids, organisms, genes in common, obs columns.

Each of several files can be usable alone and all of them together not: one named by Ensembl id and one by symbol would
be read as twice the genes, each file with zeros in the other's half.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import pandas as pd

from pipeline.data.findings import Finding, error, warning
from pipeline.data.tables import plain_id
from pipeline.data.validation.gene_names import GeneNames, ensembl_columns, gene_findings, has_unique_ids, is_ensembl
from scldm.text import choices_hint, shown

FEW_SHARED = 0.5  # of a file's genes


@dataclass(frozen=True)
class FileTables:
    """What is compared of one of several files."""

    name: str
    gene_ids: Sequence[str]
    obs_columns: Sequence[str]
    label_like: Sequence[str] = ()  # obs columns that look like labels


def ensembl_column(var: pd.DataFrame) -> str | None:
    """Return the only var column that holds an Ensembl id for each gene, each once; None if there are more or none."""
    found = [c for c in ensembl_columns(var) if has_unique_ids(var[c])]
    return found[0] if len(found) == 1 else None


def columns_of_ids(variables: Mapping[str, pd.DataFrame]) -> dict[str, str]:
    """Return for some of several files the var column to take gene ids from: they differ in what their index holds.

    If the index of some files holds Ensembl ids and that of others does not, and these have a single column of Ensembl
    ids, it is taken.

    Args:
        variables: Name of a file -> its var.
    """
    by_id = {name: is_ensembl(var.index) for name, var in variables.items()}
    if all(by_id.values()) or not any(by_id.values()):
        return {}
    chosen = {name: ensembl_column(variables[name]) for name, found in by_id.items() if not found}
    return {name: column for name, column in chosen.items() if column is not None}


def taken(name: str, column: str) -> str:
    """Say which column a file's gene ids are taken from."""
    return f"{name}: gene ids are taken from var column {shown(column)}, because other files are named by Ensembl id"


def agreement_findings(files: Sequence[FileTables], labels: Sequence[str]) -> Iterator[Finding]:
    """Yield what keeps files from being read together, and what a reader of the results should know.

    Args:
        labels: obs columns that the job requires.
    """
    yield from _gene_findings(files)
    for label in labels:
        lacking = [f for f in files if label not in f.obs_columns]
        if 0 < len(lacking) < len(files):
            hint = choices_hint(label, [shown(c) for c in lacking[0].obs_columns])
            where = f"{len(lacking)} of {len(files)} files"
            yield error(f"{where} have no obs column {label!r} ({lacking[0].name}: {hint})",
                        "rename it, so that all files call it the same", count=len(lacking),
                        first=[f.name for f in lacking])  # fmt: skip
    for column in dict.fromkeys(c for f in files for c in f.label_like):
        lacking = [f for f in files if column not in f.obs_columns]
        if lacking and column not in labels:
            yield warning(f"obs column {shown(column)!r} is in {len(files) - len(lacking)} of {len(files)} files",
                          "it can be a label only if all files have it: rename columns that mean the same",
                          count=len(lacking), first=[f"not in {f.name}" for f in lacking])  # fmt: skip


def _gene_findings(files: Sequence[FileTables]) -> Iterator[Finding]:
    ids = [{plain_id(x) for x in f.gene_ids} for f in files]
    kinds = [is_ensembl(f.gene_ids) for f in files]
    if any(kinds) and not all(kinds):
        other = [f.name for f, by_id in zip(files, kinds, strict=True) if not by_id]
        yield error(f"genes of {len(files) - len(other)} files are named by Ensembl id, and those of {len(other)} are "
                    "not", "name a column of Ensembl ids that all files have in ingest.source.gene_id, or save them "
                    "with the same kind of names", count=len(other), first=other)  # fmt: skip
        return
    union = sorted(set().union(*ids))
    yield from (f for f in gene_findings(GeneNames(union)) if f.level == "error")
    n_files = pd.Series([x for found in ids for x in found]).value_counts()
    shared = [len([x for x in found if n_files[x] > 1]) / max(1, len(found)) for found in ids]
    alone = [f.name for f, share in zip(files, shared, strict=True) if share == 0]
    if alone:
        yield error(f"{len(alone)} of {len(files)} files share no gene with any other file",
                    "they would be read as other genes: check what names them, and ingest.source.gene_id",
                    count=len(alone), first=alone)  # fmt: skip
        return
    few = [f"{f.name}: {share:.0%}" for f, share in zip(files, shared, strict=True) if share < FEW_SHARED]
    if few:
        yield warning(f"{len(few)} of {len(files)} files share less than half of their genes with other files",
                      "check that the same ids mean the same genes", count=len(few), first=few)  # fmt: skip
