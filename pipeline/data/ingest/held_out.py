"""Holds out whole combinations of labels, as Parse1M (cell type and cytokine) and Replogle are split.

A combination names some obs columns and a class of each; a cell belongs to it if it has all of them. All its cells go
to the split that the combination is held out for, regardless of the cell's hash, so none of them is trained on.
"""

from __future__ import annotations

import itertools
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from pipeline.config.job import HeldOutConfig
from pipeline.data.loading.blocks import LABEL
from scldm.data.class_names import ClassFinder, class_name, class_text
from scldm.data.user_table import read_table
from scldm.errors import InputError
from scldm.text import choices_hint

if TYPE_CHECKING:
    from pipeline.data.ingest.dataset import IngestedDataset

SIDES = ("validation", "test")  # a cell of combinations of both is in the last
SHOWN = 10  # problems in one message


@dataclass(frozen=True)
class Combination:
    classes: dict[str, str]  # obs column -> class
    split: str
    where: str  # for messages


def read_combinations(config: HeldOutConfig | None) -> list[Combination]:
    """Return the combinations of a config, with one class for each column."""
    if config is None:
        return []
    if config.table is not None:
        return _of_table(Path(config.table).expanduser(), config.split)
    found = []
    for i, given in enumerate(config.combinations or []):
        choices = [[class_text(x) for x in (v if isinstance(v, list) else [v])] for v in given.values()]
        where = f"ingest.split.held_out.combinations[{i}]"
        found += [
            Combination(dict(zip(given, c, strict=True)), config.split, where) for c in itertools.product(*choices)
        ]
    return found


def columns_of(config: HeldOutConfig | None) -> dict[str, str]:
    """Return the obs columns that the combinations name, each with the setting or table that names it first."""
    places: dict[str, str] = {}
    for x in read_combinations(config):
        for column in x.classes:
            places.setdefault(column, x.where)
    return places


def find_classes(cells: pd.DataFrame, combinations: list[Combination]) -> list[Combination]:
    """Return the combinations with the classes as the data call them: 1.0 is the class 1.

    Raises:
        InputError: No cell has a class.
    """
    known = {c: [str(x) for x in cells[c].unique()] for c in {c for x in combinations for c in x.classes}}
    finders = {c: ClassFinder(names) for c, names in known.items()}
    problems, found = [], []
    for x in combinations:
        classes = {c: finders[c].find(name) for c, name in x.classes.items()}
        for column in (c for c, name in classes.items() if name is None):
            hint = choices_hint(x.classes[column], sorted(known[column])[:50], "there are")
            problems.append(f"{x.where} ({_text(x.classes)}): no selected cell has {column} "
                            f"{x.classes[column]!r} ({hint})")  # fmt: skip
        found.append(replace(x, classes={c: name for c, name in classes.items() if name is not None}))
    _raise_all(problems)
    return found


def hold_out(cells: pd.DataFrame, split: np.ndarray, combinations: list[Combination]) -> np.ndarray:
    """Move every cell of a combination to its split, and return the splits of all cells.

    Args:
        cells: Eligible cells, with the columns of the combinations, none missing.
        split: Split of each cell by its hash, (n,).
        combinations: With classes as the data call them, see `find_classes`.

    Raises:
        InputError: A combination is held out twice, or none has cells.
    """
    _require_different(combinations)
    moved, any_cell = split.astype(object), False
    for side in SIDES:
        for _, which in _which(cells, [x for x in combinations if x.split == side]):
            moved[which >= 0] = side
            any_cell |= bool((which >= 0).any())
    if not any_cell:
        shown = [f"{_text(x.classes)} ({x.where})" for x in combinations[:SHOWN]]
        more = [f"and {len(combinations) - SHOWN} more"] if len(combinations) > SHOWN else []
        raise InputError(
            f"ingest.split.held_out: none of the {len(combinations)} combinations has cells: "
            f"{'; '.join([*shown, *more])}. There are cells of each of these classes, but not of them together"
        )
    return moved.astype(str)


def in_combinations(cells: pd.DataFrame, combinations: list[Combination]) -> np.ndarray:
    """Return which cells belong to a combination, bool (n,); one whose columns the cells lack holds none of them.

    Args:
        cells: Names of classes by obs column; None: no class.
    """
    found = np.zeros(len(cells), bool)
    known = [x for x in combinations if set(x.classes) <= set(cells)]
    named = cells[sorted({c for x in known for c in x.classes})].astype(object).fillna("")
    for _, which in _which(named, known):
        found |= which >= 0
    return found


def counted(cells: pd.DataFrame, combinations: list[Combination]) -> pd.DataFrame:
    """Return a table of the combinations: split, n_cells, and `label:<column>` for each obs column (empty: any)."""
    n_cells = np.zeros(len(combinations), np.int64)
    for members, which in _which(cells, combinations):
        n_cells[members] = np.bincount(which[which >= 0], minlength=len(members))
    classes = pd.DataFrame([{LABEL + k: v for k, v in x.classes.items()} for x in combinations])
    return pd.concat([pd.DataFrame({"split": [x.split for x in combinations], "n_cells": n_cells}), classes], axis=1)


def held_out_groups(data: IngestedDataset, split: str) -> list[dict[str, str]]:
    """Return the classes of all labels, of each group of cells of a split that a held-out combination moved there.

    Combinations that name another obs column than the labels are not looked up.
    """
    table = _table_of(data)
    table = table[table["split"] == split]
    groups = data.composition(split)
    found = []
    for group in groups.drop(columns="n_cells").to_dict("records"):
        for row in table.drop(columns=["split", "n_cells"]).to_dict("records"):
            named = {str(c).removeprefix(LABEL): v for c, v in row.items() if isinstance(v, str)}
            if named and all(group.get(c) == v for c, v in named.items()):
                found.append({str(c): str(v) for c, v in group.items()})
                break
    return found


def check_trained_classes(data: IngestedDataset) -> None:
    """Check that held-out combinations leave training cells to every class that they name.

    Labels with values (numbers, sets, vectors) are known beyond their classes and are not checked.

    Raises:
        InputError: A class that a combination names has no training cell; all are listed.
    """
    table = _table_of(data)
    trained = data.composition("train", replayed=True)
    problems = []
    for label in data.vocabulary.labels:
        if label.values is not None or LABEL + label.name not in table:
            continue
        named = table.loc[table["n_cells"] > 0, LABEL + label.name]
        known = set(trained[label.name].astype(str))
        if lost := sorted({x for x in named if isinstance(x, str)} - known):
            problems.append(
                f"ingest.split.held_out leaves no training cells to {label.name} {', '.join(map(repr, lost))}, so the "
                f"flow cannot learn what that means; hold fewer of its combinations out, or leave {label.name} out of "
                "ingest.labels"
            )
    _raise_all(problems)


def _table_of(data: IngestedDataset) -> pd.DataFrame:
    facts = data.facts.get("held_out")
    if facts is None:
        return pd.DataFrame({"split": [], "n_cells": []})
    return pd.read_parquet(data.folder / facts["table"])


def _which(cells: pd.DataFrame, combinations: list[Combination]) -> Iterator[tuple[list[int], np.ndarray]]:
    """Yield for each set of columns its combinations, and which of them each cell belongs to, -1 for none."""
    by_columns = defaultdict(list)
    for i, x in enumerate(combinations):
        by_columns[tuple(sorted(x.classes))].append(i)
    for columns, members in by_columns.items():
        cell, wanted = np.zeros(len(cells), np.int64), np.zeros(len(members), np.int64)
        for column in columns:
            values = cells[column].astype("category")
            place = {str(c): i for i, c in enumerate(values.cat.categories)}
            # One more value, for classes that no cell has.
            cell = cell * (len(place) + 1) + values.cat.codes.to_numpy(np.int64)
            wanted = wanted * (len(place) + 1) + [
                place.get(combinations[i].classes[column], len(place)) for i in members
            ]
        yield members, pd.Index(wanted).get_indexer(cell)


def _require_different(combinations: list[Combination]) -> None:
    problems: list[str] = []
    sides: dict[tuple, Combination] = {}
    for x in combinations:
        before = sides.setdefault(tuple(sorted(x.classes.items())), x)
        if before is not x:
            what = "for two splits" if before.split != x.split else "twice"
            problems.append(f"{x.where}: {_text(x.classes)} is held out {what}, first by {before.where}")
    _raise_all(problems)


def _raise_all(problems: list[str]) -> None:
    if problems:
        more = [f"and {len(problems) - SHOWN} more"] if len(problems) > SHOWN else []
        raise InputError("\n".join([*problems[:SHOWN], *more]))


def _of_table(path: Path, split: str) -> list[Combination]:
    table = read_table(path, "ingest.split.held_out.table")
    found = []
    for i, row in enumerate(table.to_dict("records")):
        where = f"ingest.split.held_out.table: {path.name}, row {i + 1}"
        side = class_name(row.pop("split", split)) or split
        if side not in SIDES:
            raise InputError(f"{where}: split is {side!r}; it may be {' or '.join(SIDES)}")
        classes = {str(k): name for k, v in row.items() if (name := class_name(v)) is not None}
        if not classes:
            raise InputError(f"{where}: names no class, so every cell would belong to it; delete the row")
        found.append(Combination(classes, side, where))
    if not found:
        raise InputError(f"ingest.split.held_out.table: {path} has no rows, so it holds nothing out")
    return found


def _text(classes: dict[str, str]) -> str:
    return ", ".join(f"{k} {v!r}" for k, v in classes.items())


# ---- facts -------------------------------------------------------------------------------------------------------
def held_out_facts(table: pd.DataFrame, folder: Path) -> dict[str, Any]:
    """Write the list of combinations to a file; return the facts about it."""
    table.to_parquet(folder / "held_out.parquet", index=False)
    columns = [c.removeprefix(LABEL) for c in table if c.startswith(LABEL)]
    return {
        "held_out": {
            "table": "held_out.parquet",
            "columns": columns,
            "n_combinations": {s: int((table["split"] == s).sum()) for s in SIDES},
            "n_cells": {s: int(table.loc[table["split"] == s, "n_cells"].sum()) for s in SIDES},
        }
    }


def notes_on(table: pd.DataFrame, obs: pd.DataFrame, split: np.ndarray, by: str) -> list[str]:
    """Describe what a reader of the results should know about the combinations.

    Args:
        obs: Cells, with the column `by` if the split is by a column.
        split: Final split of each cell.
    """
    notes = []
    if none := int((table["n_cells"] == 0).sum()):
        notes.append(f"{none} of {len(table)} held-out combinations have no cells.")
    if by not in ("cell", "tile"):
        trained = set(obs.loc[split == "train", by].astype(str))
        shared = trained & set(obs.loc[split != "train", by].astype(str))
        if shared:
            notes.append(
                f"{len(shared)} {by} have cells both in training and in held-out combinations: for these, only the "
                "combination is held out."
            )
    return notes
