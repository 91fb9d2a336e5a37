"""Choose the obs columns that `scldm init` takes as labels, with a reason for each column that it does not take.

Generation is conditioned on labels: columns of classes, each with enough cells to learn from. A class costs one
embedding; it needs examples.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from pipeline.data.tables import reserved_columns, reserved_problem
from scldm.data.labels.reserved_names import is_reserved
from scldm.errors import InputError
from scldm.text import choices_hint, shown

MOST_CLASSES = 1000
ENOUGH_CELLS = 10  # of the middle class
MOST_MISSING = 0.2  # share of the cells
TYPES = ("cell_type", "celltype", "cell_ontology_class", "annotation", "annotations", "cell_label", "celltypes",
         "cell_types", "cluster", "clusters", "leiden", "louvain", "seurat_clusters")  # fmt: skip
TREATED = ("perturbation", "cytokine", "treatment", "condition", "stimulation", "stim", "drug", "compound",
           "target_gene", "gene", "guide", "genotype", "time_point", "timepoint", "disease",
           "tissue", "cell_line")  # fmt: skip
DONORS = ("donor_id", "donor", "patient", "patient_id", "individual", "subject", "subject_id", "animal", "mouse_id")
DOSES = ("dose", "doses", "concentration", "conc")
MEASURED = ("time", "age", "day", "days", "hour", "hours", "week", "weeks", "minutes", "pseudotime", "timepoint")
UNITS = ("uM", "nM", "mM", "pM", "ng", "ug", "mg", "hours", "hrs", "hr", "h", "days", "d", "weeks", "years", "min")
MANY_VALUES = 10  # whole numbers of more different values are no classes
WIDE = 100  # greatest over least positive dose of a log scale
TECHNICAL = (*DONORS, "batch", "sample", "sample_id", "library", "library_id", "orig_ident", "dataset_id", "dataset",
             "run", "lane", "plate", "barcode", "assay", "replicate", "phase", "predicted_doublet")  # fmt: skip


@dataclass(frozen=True)
class Verdict:
    """The decision about one column."""

    column: str
    taken: bool
    reason: str


@dataclass(frozen=True)
class Labels:
    columns: tuple[str, ...]  # of obs, in the order of the job
    verdicts: tuple[Verdict, ...]  # of every column, in the order of obs
    drops: int  # cells at most that have no value of some label, and are left out
    numbers: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)  # column -> settings of ingest.label_values

    @property
    def reason(self) -> dict[str, str]:
        return {v.column: v.reason for v in self.verdicts}


def choose_labels(
    columns: Mapping[str, Mapping[str, Any]], n_cells: int, requested: Sequence[str] = (), *, renamed: bool = True
) -> Labels:
    """Choose labels among the columns of obs: those requested, or at most one of cell types and one of treatments.

    Args:
        columns: As `obs_profile`.
        renamed: Whether the source has a setting that renames columns, `ingest.source.columns`.

    Raises:
        InputError: A requested label is not a column, or holds no classes; all of them are named.
    """
    if problems := [p for name in requested if (p := _request_problem(name, columns)) is not None]:
        raise InputError("\n".join(problems))
    unfit = {c: reason for c, p in columns.items() if (reason := _unfit(c, p, n_cells, renamed)) is not None}
    chosen = list(dict.fromkeys(requested)) or _best([c for c in columns if c not in unfit])
    verdicts = []
    for column, profile in columns.items():
        if column in chosen:
            reason = f"asked for: {_sizes(profile)}" if requested else _sizes(profile)
            reason += f"; {_as_number(column, profile)}" if is_number(column, profile) else ""
            verdicts.append(Verdict(column, True, reason))
        else:
            reason = unfit.get(column) or f"{_sizes(profile)}: usable; --label {_quoted(column)} takes it"
            verdicts.append(Verdict(column, False, reason))
    numbers = {c: number_settings(c, columns[c]) for c in chosen if is_number(c, columns[c])}
    return Labels(tuple(chosen), tuple(verdicts), sum(columns[c]["n_missing"] for c in chosen), numbers)


# ---- numbers -----------------------------------------------------------------------------------------------------
def is_number(column: str, p: Mapping[str, Any]) -> bool:
    """Return whether a label is taken as a number: it has fractions, is named like one, or has many whole values."""
    if p["kind"] in ("few numbers", "decimal numbers"):
        return True
    if p["kind"] != "whole numbers" or _plain(column) in (*TYPES, *TECHNICAL):
        return False
    return bool(set(_plain(column).split("_")) & {*MEASURED, *DOSES}) or p["n_classes"] > MANY_VALUES


def number_settings(column: str, p: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings of a number: a unit if the name ends in one, and a log scale for doses over a wide range."""
    settings: dict[str, Any] = {"type": "number"}
    if unit := next((u for u in UNITS if re.search(rf"[_ .(]{u}\)?$", column, re.IGNORECASE)), None):
        settings["unit"] = unit
    least, least_positive, greatest = p["numbers"] or (0.0, None, 0.0)
    wide = least_positive is not None and least >= 0 and greatest >= WIDE * least_positive
    if wide and set(_plain(column).split("_")) & set(DOSES):
        settings |= {"scale": "log"} | ({"zero": [0]} if least == 0 else {})
    return settings


def _as_number(column: str, p: Mapping[str, Any]) -> str:
    settings = number_settings(column, p)
    scale = ", on a log scale, 0 as the untreated control" if "zero" in settings else ", on a log scale"
    why = "it has fractions" if p["kind"] != "whole numbers" else "it has many values"
    if p["kind"] == "whole numbers" and set(_plain(column).split("_")) & {*MEASURED, *DOSES}:
        why = "its name is of one"
    return f"taken as a number{scale if 'scale' in settings else ''}: {why}; ingest.label_values={{}} makes it classes"


def donor_column(columns: Mapping[str, Mapping[str, Any]]) -> str | None:
    """Return the column of donors, or None."""
    named = {_plain(c): c for c in reversed(list(columns))}
    return next((named[d] for d in DONORS if d in named and columns[named[d]]["n_classes"] > 1), None)


def _unfit(column: str, p: Mapping[str, Any], n_cells: int, renamed: bool) -> str | None:
    """Return why a column is not taken as a label unless requested; None if it may be one."""
    add = f"; --label {_quoted(column)} takes it all the same"
    if reserved_columns([column]):
        return "SOMA uses this name, the reader leaves the column out"
    if is_reserved(column):
        rename = "; ingest.source.columns renames it" if renamed else ""
        return f"requests or generated cells have a column of this name{rename}"
    if p["kind"] == "decimal numbers":
        return f"decimal numbers: a measurement, not classes{add}, as a number"
    if p["n_classes"] < 2:
        return "no value in any cell" if not p["n_classes"] else "one value for all cells: nothing to tell apart"
    if p["kind"] == "whole numbers":
        as_one = ", as a number" if is_number(column, p) else ""
        return f"whole numbers ({p['n_classes']:,} different): counts, or classes{add}{as_one}"
    if p["kind"] == "few numbers":
        return f"numbers ({p['n_classes']:,} different): doses or days, or measurements{add}, as a number"
    if p["n_missing"] > MOST_MISSING * n_cells:
        return f"{p['n_missing']:,} of {n_cells:,} cells have no value{add}"
    if p["n_classes"] > MOST_CLASSES or p["middle"] < ENOUGH_CELLS:
        return f"{p['n_classes']:,} classes for {n_cells:,} cells, {p['middle']:,} in the middle one: too few{add}"
    if p["same_as"] is not None:
        return f"groups the cells exactly as {shown(p['same_as'])} does"
    if _plain(column) in TECHNICAL:
        return f"{p['n_classes']} classes, but its name is of a batch, donor or sample{add}"
    return None


def _best(usable: Sequence[str]) -> list[str]:
    """Return one column named like a cell type and one like a treatment; without either, the first usable one."""
    named = {_plain(c): c for c in reversed(usable)}
    kinds = [next((named[n] for n in names if n in named), None) for names in (TYPES, TREATED)]
    return [c for c in kinds if c is not None] or list(usable[:1])


def _request_problem(name: str, columns: Mapping[str, Mapping[str, Any]]) -> str | None:
    if name not in columns:
        hint = choices_hint(name, [shown(c) for c in list(columns)[:20]])
        return f"--label {shown(name)}: obs has no such column ({hint})"
    p = columns[name]
    if reserved_columns([name]):
        what, remedy = reserved_problem([shown(name)])
        return f"--label {shown(name)}: {what}; {remedy}"
    if p["n_classes"] < 2:
        return f"--label {shown(name)}: {p['n_classes']} class; a label needs two or more"
    return None


def _sizes(p: Mapping[str, Any]) -> str:
    gaps = f"; {p['n_missing']:,} cells have none" if p["n_missing"] else ""
    return f"{p['n_classes']:,} classes of {p['smallest']:,} to {p['largest']:,} cells{gaps}"


def _plain(name: str) -> str:
    """Normalise a name: lower case, words joined by _; ontology columns get the name of the column they describe."""
    return re.sub(r"[^a-z0-9]+", "_", str(name).lower()).strip("_").removesuffix("_ontology_term_id")


def _quoted(name: str) -> str:
    plain = shown(name)
    return plain if re.fullmatch(r"[A-Za-z0-9_.:-]+", plain) else "'" + plain.replace("'", "'\\''") + "'"
