"""Exports generated and measured cells as the pair of files that `cell-eval` compares (PyPI; Virtual Cell Challenge).

real.h5ad holds the held-out cells of the combinations that were generated, pred.h5ad the generated ones; both hold the
same training cells of the control. X is log1p CP10k. obs has the column `perturbation`, and `context` if there are
other labels than the treatment's.
"""

from __future__ import annotations

import shlex
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import pandas as pd
import scipy.sparse as sp
from anndata import AnnData

from pipeline.core.files import temporary_path
from pipeline.core.manifest import Manifest, read_manifest
from pipeline.data.ingest.dataset import IngestedDataset
from scldm.cells.cells import Cells
from scldm.data.cell_counts import is_log_normalised
from scldm.data.vocabulary import Vocabulary
from scldm.errors import InputError
from scldm.metrics.genes.expression import as_log_values, log1p_cp10k

MAX_CELLS = 200_000  # of a side: both are held in memory
MIN_CONTROLS = 10  # of a context
JOIN = " + "
PERTURBATION, CONTEXT = "perturbation", "context"


def export_cell_eval(cells: Cells, out: Path, *, control: Mapping[str, str], split: str = "test") -> str:
    """Write `out`/real.h5ad and `out`/pred.h5ad, and return the command that compares them.

    Args:
        cells: Generated cells of a pipeline.
        out: Folder to make.
        control: Label of the treatment -> its control class.
        split: The split of the measured cells.

    Raises:
        InputError: `out` exists; the cells belong to no pipeline with an ingest; a label, a class or control cells are
            missing; no measured cell has a combination that was generated.
    """
    if out.exists():
        raise InputError(f"{out} exists already; name another folder, or remove it")
    if cells.n_obs > MAX_CELLS:
        raise InputError(f"{cells.n_obs:,} cells are too many to compare in memory; generate at most {MAX_CELLS:,}")
    data = IngestedDataset.open(_ingest_of(cells))
    context = _context(data.vocabulary, control)
    generated, measured, training = cells[:], data.anndata(split, MAX_CELLS), data.anndata("train", MAX_CELLS)
    sides = cell_eval_sides(generated, measured, training, control=control, context=context)
    out.parent.mkdir(parents=True, exist_ok=True)
    tmp = temporary_path(out)
    try:
        tmp.mkdir()
        for name, adata in sides.items():
            adata.write_h5ad(tmp / f"{name}.h5ad", compression="gzip")
        tmp.rename(out)
    finally:
        shutil.rmtree(tmp, ignore_errors=True)
    command = ["cell-eval", "run", "-ap", str(out / "pred.h5ad"), "-ar", str(out / "real.h5ad")]
    command += ["--control-pert", _joined(control.values()), "--pert-col", PERTURBATION]
    command += ["--celltype-col", CONTEXT] if context else []
    return shlex.join([*command, "-o", str(out / "scores"), "--num-threads", "1"])


def _ingest_of(cells: Cells) -> Manifest:
    """Return the ingest of the pipeline that generated the cells."""
    made = read_manifest(cells.folder)
    version = made.inputs.get("ingest") if made is not None else None
    found = read_manifest(cells.folder.resolve().parents[1] / "ingest" / version) if version else None
    if found is None:
        raise InputError(
            f"{cells.folder} lies in no pipeline with an ingest, and measured cells are read from the ingest that the "
            "cells were generated for"
        )
    return found


def _context(vocabulary: Vocabulary, control: Mapping[str, str]) -> list[str]:
    """Return the labels that are not the treatment's."""
    problems = []
    labels = {x.name: x for x in vocabulary.labels}
    for name, value in control.items():
        if name not in labels:
            problems.append(f"the cells have no label {name!r}; they have {', '.join(labels) or 'none'}")
        elif not labels[name].knows(value):
            problems.append(f"{name} has no class {value!r}; it has {', '.join(labels[name].classes[:8])}")
    if not control:
        problems.append("name the control of the treatment: --control LABEL=CLASS")
    if problems:
        raise InputError("\n".join(problems))
    return [name for name in labels if name not in control]


def cell_eval_sides(
    generated: AnnData, measured: AnnData, training: AnnData, *, control: Mapping[str, str], context: Sequence[str]
) -> dict[str, AnnData]:
    """Return the cells of both files, `pred` and `real`.

    Args:
        generated: Generated cells; labels are columns of obs.
        measured: Held-out cells, of which those are taken whose treatment was generated in their context.
        training: Training cells, from which the controls of these contexts are taken.
        control: Label of the treatment -> its control class.
        context: The other labels.

    Raises:
        InputError: Genes differ, no measured cell has a combination that was generated, or a context has no controls.
    """
    treatment = list(control)
    if list(generated.var_names) != list(measured.var_names):
        raise InputError(f"the cells hold {generated.n_vars} of {measured.n_vars} genes: generate all of them")
    named = {"pred": _named(generated.obs, treatment, context), "real": _named(measured.obs, treatment, context)}
    asked = set(named["pred"].itertuples(index=False, name=None))
    chosen = np.array([pair in asked for pair in named["real"].itertuples(index=False, name=None)])
    own = (named["pred"][PERTURBATION] != _joined(control.values())).to_numpy()
    chosen &= (named["real"][PERTURBATION] != _joined(control.values())).to_numpy()
    if not chosen.any() or not own.any():
        raise InputError(
            "no held-out cell has a treatment that was generated in its context; generate with generate.like=test"
        )
    controls = _controls(training, treatment, context, control, set(named["real"][chosen][CONTEXT]))
    sides = {}
    for name, adata, rows in (("pred", generated, own), ("real", measured, chosen)):
        obs = pd.concat([named[name][rows], controls.obs])
        obs.index = pd.Index([f"{name}-{i}" for i in range(len(obs))])
        log = as_log_values(adata.X) if is_log_normalised(adata.uns) else log1p_cp10k(adata.X)
        x = sp.vstack([log[np.flatnonzero(rows)], controls.X], format="csr").astype(np.float32)
        columns = [PERTURBATION, *([CONTEXT] if context else [])]
        sides[name] = AnnData(x, obs[columns].astype("category"), pd.DataFrame(index=measured.var_names))
    return sides


def _controls(
    training: AnnData, treatment: list[str], context: Sequence[str], control: Mapping[str, str], wanted: set[str]
) -> AnnData:
    """Return the control cells of the contexts, from the training cells: log1p CP10k, obs as `_named`."""
    named = _named(training.obs, treatment, context)
    rows = ((named[PERTURBATION] == _joined(control.values())) & named[CONTEXT].isin(wanted)).to_numpy()
    n = named[rows][CONTEXT].value_counts()
    if few := sorted(c for c in wanted if n.get(c, 0) < MIN_CONTROLS):
        raise InputError(
            f"fewer than {MIN_CONTROLS} training cells of the control {_joined(control.values())!r} in "
            f"{', '.join(few[:5])}: the effect of a treatment is measured against them"
        )
    return AnnData(log1p_cp10k(training.X)[np.flatnonzero(rows)], named[rows], training.var)


def _named(obs: pd.DataFrame, treatment: Sequence[str], context: Sequence[str]) -> pd.DataFrame:
    """Return the columns perturbation and context; a cell without the label is "none"."""
    columns = {PERTURBATION: treatment, CONTEXT: context}
    found = {name: [_joined(row) for row in zip(*(_text(obs[x]) for x in labels), strict=True)] if labels else ""
             for name, labels in columns.items()}  # fmt: skip
    return pd.DataFrame(found, index=obs.index)


def _text(column: pd.Series) -> list[str]:
    return ["none" if pd.isna(v) else str(v) for v in column]


def _joined(names: object) -> str:
    return JOIN.join(names)  # type: ignore[arg-type]
