"""Tables that users write: conditions of a generation, and held-out combinations."""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

Row = tuple[str | None, int]  # class of cell_type, number of cells
PLAIN: list[Row] = [("B", 3), ("T", 4)]


@dataclass(frozen=True)
class TableCase:
    """A table of conditions (cell_type, n_cells), or the same as one of held-out classes (cell_type, split).

    Args:
        write: Writes a table into a folder, and returns the path.
        usable: Whether the table must be read.
    """

    name: str
    write: Callable[[Path, pd.DataFrame], Path]
    rows: Sequence[Row] = tuple(PLAIN)
    usable: bool = True

    def conditions(self, folder: Path) -> Path:
        return self.write(folder, pd.DataFrame(list(self.rows), columns=["cell_type", "n_cells"]))

    def held_out(self, folder: Path) -> Path:
        return self.write(folder, pd.DataFrame({"cell_type": [c for c, _ in self.rows], "split": "test"}))


def text(ending: str = "csv", *, encoding: str = "utf-8", change: Callable[[str], str] = str, **how: Any) -> Callable:
    """Return a writer of a text file; `how` is passed to `to_csv`."""

    def write(folder: Path, table: pd.DataFrame) -> Path:
        out = io.StringIO()
        table.to_csv(out, **{"sep": "\t" if ending == "tsv" else ",", "index": False, **how})
        path = folder / f"table.{ending}"
        path.write_bytes(change(out.getvalue()).encode(encoding))
        return path

    return write


def longer(lines: str) -> str:
    """Add a field to every row but the header."""
    header, *rows = lines.splitlines()
    return "\n".join([header, *(f"{row},x" for row in rows)]) + "\n"


def parquet(change: Callable[[pd.DataFrame], pd.DataFrame] = lambda table: table, index: bool = False) -> Callable:
    def write(folder: Path, table: pd.DataFrame) -> Path:
        change(table).to_parquet(folder / "table.parquet", index=index)
        return folder / "table.parquet"

    return write


def typed(kind: str) -> Callable[[pd.DataFrame], pd.DataFrame]:
    return lambda table: table.astype({"cell_type": kind})


TABLES: list[TableCase] = [
    TableCase("csv", text()),
    TableCase("csv with BOM", text(encoding="utf-8-sig")),
    TableCase("csv with CRLF", text(lineterminator="\r\n")),
    TableCase("csv of a Mac", text(lineterminator="\r")),
    TableCase("csv, all quoted", text(quoting=1)),
    TableCase("csv with BOM, all quoted", text(encoding="utf-8-sig", quoting=1)),
    TableCase("csv without a last line end", text(change=str.rstrip)),
    TableCase("csv with blank lines", text(change=lambda x: x.replace("\n", "\n\n"))),
    TableCase("csv in capitals", lambda folder, table: text()(folder, table).rename(folder / "table.CSV")),
    TableCase("tsv", text("tsv")),
    TableCase("tsv with BOM and CRLF", text("tsv", encoding="utf-8-sig", lineterminator="\r\n")),
    TableCase("parquet", parquet()),
    TableCase("parquet of categories", parquet(typed("category"))),
    TableCase("parquet with an index of rows", parquet(index=True)),
    TableCase("parquet with a named index", parquet(lambda t: t.set_index("cell_type"), index=True)),
    TableCase("parquet of whole numbers", parquet(typed("int64")), [("1", 3), ("2", 4)]),
    TableCase("parquet of floats", parquet(typed("float64")), [("1", 3), ("2", 4)]),
    *(TableCase(f"{ending}: classes {kind}", text(ending), rows) for ending in ("csv", "tsv") for kind, rows in {
        "NA and None": [("NA", 1), ("None", 2), ("null", 3)],
        "of numbers": [("1", 2), ("2", 3), ("10", 4)],
        "of numbers with zeros": [("001", 2), ("002", 3)],
        "of doses": [("0.1", 2), ("1.5", 3)],
        "of booleans": [("True", 2), ("False", 3)],
        "with commas and quotes": [("B, naive", 2), ('T "helper"', 3), ("a;b", 1)],
        "in other letters": [("β-Zelle", 2), ("細胞", 3), ("e\u0301", 4)],
        "like dates": [("1-Mar", 2), ("2024-01-31", 3)],
    }.items()),
    TableCase("csv: one row", text(), [("B", 1)]),
    TableCase("csv with white space around classes", text(change=lambda x: x.replace("B", " B ")), [("B", 1)]),
    TableCase("csv with its row numbers", text(index=True), [("B", 1)]),
    TableCase("csv of semicolons", text(sep=";"), [("B", 1)]),
    TableCase("csv in UTF-16", text(encoding="utf-16"), usable=False),
    TableCase("csv with a longer row", text(change=lambda x: x + "B,1,2\n"), usable=False),
    TableCase("csv with longer rows", text(change=longer), usable=False),
    TableCase("csv without a header", text(header=False), usable=False),
    TableCase("csv that is empty", text(change=lambda x: ""), usable=False),
    TableCase("parquet with an unnamed index",
              parquet(lambda t: t.set_index("cell_type").rename_axis(None), index=True), usable=False),
    TableCase("parquet that is text", lambda folder, table: text()(folder, table).rename(folder / "t.parquet"),
              usable=False),
    TableCase("xlsx", lambda folder, table: text()(folder, table).rename(folder / "table.xlsx"), usable=False),
]  # fmt: skip
