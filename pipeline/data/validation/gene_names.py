"""Checks names of genes: unique Ensembl ids of one organism, and where they are if not where they were sought."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import pandas as pd

from pipeline.data.findings import FIRST, Finding, error, warning
from pipeline.data.tables import plain_id
from pipeline.data.validation.odd_names import odd_findings
from scldm.text import shown

_ORGANISM = {"ENSG": "human", "ENSMUSG": "mouse", "ENSRNOG": "rat", "ENSDARG": "zebrafish", "ENSMMUG": "macaque"}
_VIRUSES = {"ENSSASG"}  # SARS-CoV-2, whose genes CELLxGENE allows in addition to the host's
_ENSEMBL = re.compile(r"^(ENS[A-Z]*G)\d{6,}(\.\d+)?$")
_NO_ID = ("", "nan", "None", "<NA>")
IDS_OF_SOMA = "leave them out with ingest.genes.value_filter, or write the experiment with unique ids"
READ_OF_SOMA = "gene ids of an experiment are read from feature_id or var_id"


@dataclass(frozen=True)
class GeneNames:
    """Gene ids as in a source, and what else it has, for advice.

    Args:
        ids: One per gene.
        kind: Kind of the source.
        column: var column that the ids are from; None: the index of an `.h5ad` file.
        var: Other columns; None if they are not known.
    """

    ids: Sequence[str]
    kind: Literal["h5ad", "10x", "SOMA"] = "h5ad"
    column: str | None = None
    var: pd.DataFrame | None = None

    def others(self) -> pd.DataFrame:
        """Return the other columns of var."""
        return pd.DataFrame() if self.var is None else self.var.drop(columns=[self.column] if self.column else [])

    def make_unique(self) -> str:
        """Return how each gene gets an id of its own."""
        if self.kind == "SOMA":
            return IDS_OF_SOMA
        if self.kind == "10x":
            return "give each feature an id of its own"
        if self.var is not None and not (usable := unique_columns(self.others())):
            ways = ["var has no other column with an id for each gene, each once"]
        else:
            hint = f" ({', '.join(map(shown, usable[:FIRST]))})" if self.var is not None else ""
            ways = [f"name a var column of unique ids{hint} in ingest.source.gene_id"]
        last = "call adata.var_names_make_unique()" if self.column is None else f"complete {shown(self.column)}"
        return f"{ways[0]}{': ' if ways[0].startswith('var') else ', or '}{last}"

    def fill_in(self) -> str:
        """Return how genes without an id get one."""
        if self.kind != "h5ad":
            return self.make_unique()
        usable = None if self.var is None else unique_columns(self.others())
        if usable is not None and not usable:
            return "var has no other column with an id for each gene, each once: leave those genes out, or name them"
        hint = f" ({', '.join(map(shown, usable[:FIRST]))})" if usable else ""
        return f"name a var column of unique ids{hint} in ingest.source.gene_id, or leave those genes out"

    def where_ensembl(self) -> str:
        """Return where Ensembl ids are instead, if they are anywhere in var; nothing if most of the ids are some."""
        if is_ensembl(self.ids):
            return ""
        others = self.others()
        found = ensembl_columns(others)
        usable = [c for c in found if has_unique_ids(others[c])]
        if found and self.kind == "SOMA":
            place = f"var column {shown(found[0])} holds them, but {READ_OF_SOMA}"
            return f"; {place}: write the experiment again with these ids in a column feature_id"
        if usable:
            return f": set ingest.source.gene_id: {shown(usable[0])}"
        if found:
            return f"; var column {shown(found[0])} holds them and cannot be used: {_lacks(others[found[0]])}"
        return "; var has none"


def organism_of(ids: Sequence[str]) -> str | None:
    """Return the organism that gene ids are of: all of them Ensembl ids of one that is known here; else None."""
    kinds = {m[1] if (m := _ENSEMBL.match(str(x))) else "" for x in ids} - _VIRUSES
    return _ORGANISM.get(kinds.pop()) if len(kinds) == 1 else None


def gene_findings(names: GeneNames) -> Iterator[Finding]:
    """Check the gene ids of a source."""
    ids = [str(x) for x in names.ids]
    if not ids:
        yield error("there are no genes", "check that var is not empty")
        return
    yield from repeated_findings(names)
    matches = [_ENSEMBL.match(x) for x in ids]
    named = sum(m is not None for m in matches)
    if named < len(ids):
        other = [x for x, m in zip(ids, matches, strict=True) if not m]
        what = "gene ids are numbers" if all(x.isdigit() for x in other) else "gene ids are no Ensembl ids"
        yield warning(f"{len(other)} of {len(ids)} {what}",
                      f"models and files are matched by Ensembl id{names.where_ensembl()}",
                      count=len(other), first=other)  # fmt: skip
    kinds = Counter(m[1] for m in matches if m and m[1] not in _VIRUSES)
    if len(kinds) > 1:
        counts = ", ".join(f"{n} {_ORGANISM.get(k, k)}" for k, n in kinds.most_common())
        most, n_most = kinds.most_common(1)[0]
        others = [x for x, m in zip(ids, matches, strict=True) if m and m[1] not in (most, *_VIRUSES)]
        yield error(f"genes are of several organisms ({counts})", "keep the genes and cells of one",
                    count=sum(kinds.values()) - n_most, first=others)  # fmt: skip
    if versions := [x for x, m in zip(ids, matches, strict=True) if m and m[2]]:
        yield warning(f"{len(versions)} gene ids have a version", "it is stripped", count=len(versions), first=versions)
    yield from odd_findings("gene ids", ids)


def repeated_findings(names: GeneNames) -> Iterator[Finding]:
    """Yield ids that are missing or repeated, and genes that are there in several versions."""
    ids = pd.Series([str(x) for x in names.ids], dtype=object)
    absent = ids.str.strip().isin(_NO_ID)
    there = ids[~absent]
    if len(twice := there[there.duplicated()].unique()):
        yield error(f"{len(twice)} gene ids occur more than once", names.make_unique(), count=len(twice), first=twice)
    if versions := versions_of_one_gene(there):
        yield error(f"{len(versions)} genes are there in several versions",
                    "a version is stripped, so they are one gene: keep one version, or add their counts up",
                    count=len(versions), first=versions)  # fmt: skip
    if n := int(absent.sum()):
        yield error(f"{n} genes have no id", names.fill_in(), count=n)


def versions_of_one_gene(ids: Sequence[str] | pd.Series) -> list[str]:
    """Return the ids that differ in their version only, as texts: "ENSG00000243485.1 and ENSG00000243485.2"."""
    names = pd.Series(list(dict.fromkeys(map(str, ids))), dtype=object)
    plain = names.map(plain_id)
    groups = names[plain.duplicated(keep=False)].groupby(plain, sort=False)
    return [" and ".join(group) for _, group in groups]


def has_unique_ids(values: pd.Series) -> bool:
    """Return whether a column has a name for each gene, each once, whatever its version."""
    texts = values.astype(str).str.strip()
    return bool(values.notna().all() and not texts.isin(_NO_ID).any() and texts.map(plain_id).is_unique)


def unique_columns(var: pd.DataFrame) -> list[str]:
    """Return the columns of text that have a name for each gene, each once."""
    return [str(c) for c in var.columns if not pd.api.types.is_numeric_dtype(var[c]) and has_unique_ids(var[c])]


def is_ensembl(ids: Sequence[str] | pd.Index) -> bool:
    """Return whether most names of genes are Ensembl ids."""
    head = pd.Series(list(ids[:200])).astype(str)
    return len(head) > 0 and bool(head.str.match(_ENSEMBL).mean() > 0.5)


def ensembl_columns(var: pd.DataFrame) -> list[str]:
    """Return the columns whose values are mostly Ensembl gene ids."""
    head = {str(c): var[c].astype(str).head(200) for c in var.columns}
    return [c for c, values in head.items() if len(values) and values.str.match(_ENSEMBL).mean() > 0.5]


def _lacks(values: pd.Series) -> str:
    """Return why a column of ids cannot be used."""
    texts = values.astype(str).str.strip()
    absent = values.isna() | texts.isin(_NO_ID)
    twice = int(texts[~absent].map(plain_id).duplicated().sum())
    what = [f"{int(absent.sum())} genes have no id in it"] if absent.any() else []
    return " and ".join([*what, *([f"{twice} have the id of another gene"] if twice else [])])
