"""Reads lists of genes in text files: one gene per line, or a table with a header."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

from scldm.data.text_table import TextTableError, find_separator, read_rows, read_text
from scldm.text import shown

# Names of columns, in the order in which they are preferred; in a file their case and spaces do not count.
ID_COLUMNS = (
    "feature_id", "gene_id", "gene_ids", "ensembl_id", "ensembl_gene_id", "ensemblid", "ensembl", "ensg",
)  # fmt: skip
NAME_COLUMNS = (
    "feature_name", "gene_name", "gene_names", "gene_symbol", "gene_symbols", "symbol", "symbols", "hgnc_symbol",
    "gene_short_name", "gene", "genes", "feature", "features",
)  # fmt: skip


@dataclass(frozen=True)
class TextGenes:
    """Genes in the order of a file."""

    ids: list[str]
    names: list[str] | None  # None: the file has ids only, or names only, which then are the ids


def read_text_genes(path: Path, known: Collection[str] = ()) -> TextGenes:
    """Read genes from a text file in UTF-8, separated by commas, semicolons or tabs.

    A first line with a name of a column, as gene_id or symbol, is a header. Its column of ids is read, or else that of
    names; a first column without a name, as R and pandas write it, holds the ids if it holds no numbers.

    Args:
        known: Genes of the data; a first line that is one of them is a gene.

    Raises:
        TextTableError: The file is in another encoding, or it is not clear which column holds the genes.
    """
    text = read_text(path)
    rows = read_rows(text, find_separator(text, path.suffix.lower())).rows
    if not rows:
        return TextGenes([], None)
    header = [x.casefold().replace(" ", "_").replace(".", "_") for x in rows[0]]
    if {*ID_COLUMNS, *NAME_COLUMNS}.isdisjoint(header) or (len(header) == 1 and rows[0][0] in known):
        return TextGenes(_only_column(rows), None)
    return _columns(header, rows[1:])


def _only_column(rows: list[list[str]]) -> list[str]:
    if wide := next((row for row in rows if len(row) != 1), None):
        raise TextTableError(
            f"it has several columns ({shown(', '.join(wide))}): write one gene per line, or a header line that names "
            f"the column of genes {ID_COLUMNS[0]} or {ID_COLUMNS[1]}"
        )
    return [row[0] for row in rows]


def _columns(header: list[str], rows: list[list[str]]) -> TextGenes:
    if uneven := next((row for row in rows if len(row) != len(header)), None):
        raise TextTableError(
            f"a row has {len(uneven)} fields and the header {len(header)} ({shown(', '.join(uneven))}); put a field "
            "that holds the separator in double quotes"
        )
    columns = {name: [row[i] for row in rows] for i, name in reversed(list(enumerate(header)))}
    ids = next((columns[c] for c in ID_COLUMNS if c in columns), None)
    names = next((columns[c] for c in NAME_COLUMNS if c in columns), None)
    if ids is None and "" in columns and not all(x.isdigit() for x in columns[""]):
        ids = columns[""]
    found = ids if ids is not None else names
    assert found is not None
    if empty := [i for i, gene in enumerate(found) if not gene]:
        raise TextTableError(f"{len(empty)} of {len(rows)} rows name no gene, the first is row {empty[0] + 1}")
    return TextGenes(found, names if ids is not None else None)
