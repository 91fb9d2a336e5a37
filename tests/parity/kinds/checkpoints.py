"""Recorded checkpoints: each is converted by `scldm convert`, and its models must give the recorded outputs.

The outputs were recorded from one checkpoint, which the note names. The others, with compiled keys or an old module
name, must convert too; if they hold the same weights they must give the same outputs.
"""

from __future__ import annotations

import re
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import scipy.sparse as sp
import torch
from torch import Tensor

from parity.case import Case, CaseError
from parity.ledger import Ledger
from parity.tolerance import EXACT, SINGLE
from scldm.checkpoints.convert.convert import convert_upstream
from scldm.checkpoints.convert.gene_list import read_genes
from scldm.checkpoints.native import load_flow, load_vae
from scldm.checkpoints.untrusted.reader import ForeignCheckpoint, read_checkpoint
from scldm.data.batch import CellBatch
from scldm.data.vocabulary import Vocabulary
from scldm.nn.dit import DiT
from scldm.nn.vae import VAE, CountDistribution

KEYS = "state_dict_keys.json"  # a copy of the keys in the description


@dataclass(frozen=True)
class Models:
    """Models converted from a checkpoint."""

    vae: VAE
    vocabulary: Vocabulary
    raw: DiT | None = None
    averaged: DiT | None = None


def matches(case: Case) -> bool:
    return any(name.endswith(".ckpt") for name in case.facts.get("files", ()))


def files(case: Case) -> list[Path]:
    """Return all recognised files in the folder of checkpoints."""
    folder = _folder(case)
    named = {folder / name for name in case.facts["files"]}
    return [
        path for path in folder.iterdir() if path in named or path.suffix in (".ckpt", ".yaml") or path.name == KEYS
    ]


def _folder(case: Case) -> Path:
    names = case.facts["files"]
    for folder in sorted(path for path in case.folder.iterdir() if path.is_dir()):
        if all((folder / name).is_file() for name in names):
            return folder
    raise CaseError(f"no folder beside {case.name}.json holds all of {', '.join(names)}")


def _names(case: Case) -> list[str]:
    return [name for name in case.facts["files"] if name.endswith(".ckpt")]


def check(case: Case, ledger: Ledger) -> None:
    folder, note = _folder(case), case.facts.get("note", "")
    ledger.fact("files")
    source = max((name for name in _names(case) if name in note), key=len, default=None)
    if source is None:
        raise CaseError(f"{case.name}.json: the note does not say which checkpoint the outputs were recorded from")
    checkpoints = sorted(folder.glob("*.ckpt"), key=lambda path: path.name != source)
    cells, first, tables = None, None, [name for name in case.facts["files"] if name.endswith(".h5ad")]
    if len(tables) != 1:
        raise CaseError(f"{case.name}.json: files names {len(tables)} .h5ad files; the test cells are in one")
    for path in checkpoints:
        found = read_checkpoint(path)  # once: each reading starts a process
        _check_description(ledger, path.name, found)
        models = _converted(path, ledger, found)
        cells = cells or cells_of(folder / tables[0], models.vocabulary)
        first = first or models
        _check_outputs(case, ledger, path.name, models, first, cells)
    for name in ("keys", "structure", "pickle_globals", "weights_only_load"):
        if name in case.facts:
            ledger.fact(name)  # gone through by checkpoint


def _check_description(ledger: Ledger, name: str, found: ForeignCheckpoint) -> None:
    """Compare keys and counters that the description lists for a checkpoint, and the names in its pickle."""
    facts = ledger.case.facts
    if (keys := facts.get("keys", {}).get(name)) is not None:
        ledger.same(f"{name} keys", sorted(found.state), sorted(keys))
    if (structure := facts.get("structure", {}).get(name)) is not None:
        _check_structure(ledger, name, structure, found)
    if (recorded := facts.get("pickle_globals", {}).get(name)) is not None:
        unexpected = sorted(set(found.stand_ins) - {entry.replace(" ", ".") for entry in recorded})
        ledger.same(f"{name} stand-ins that the pickle does not name", unexpected, [])
    if refusal := facts.get("weights_only_load", {}).get(name):
        ledger.fault(f"{name} weights_only_load", f"torch alone: {refusal.split('.')[0]}", "read in a child process")


def _check_structure(ledger: Ledger, name: str, structure: Mapping[str, Any], found: ForeignCheckpoint) -> None:
    ledger.same(f"{name} entries", sorted({"state_dict", *found.left}), sorted(structure))
    for counter in ("epoch", "global_step"):
        if match := re.fullmatch(r"builtins\.int=(\d+)", str(structure.get(counter))):
            ledger.value(f"{name} {counter}", found.about[counter], int(match[1]), EXACT)


def _converted(path: Path, ledger: Ledger, found: ForeignCheckpoint) -> Models:
    with tempfile.TemporaryDirectory(prefix="scldm-parity-") as folder:
        converted = convert_upstream(path, config_of(path), Path(folder) / "model", foreign=found)
        loaded = load_vae(converted.vae)
        ledger.same(f"{path.name} converts", True, True)
        if converted.flow is None:
            return Models(loaded.vae, loaded.vocabulary)
        raw, averaged = (load_flow(converted.flow, weights=weights).dit for weights in ("raw", "ema"))
        return Models(loaded.vae, loaded.vocabulary, raw, averaged)


def config_of(checkpoint: Path) -> Path:
    """Return NAME_config.yaml for a checkpoint whose name begins with NAME, the longest such; or the only YAML file."""
    configs = [
        path
        for path in checkpoint.parent.glob("*_config.yaml")
        if checkpoint.name.startswith(path.name.removesuffix("_config.yaml"))
    ]
    every = list(checkpoint.parent.glob("*.yaml"))
    if not configs and len(every) == 1:
        return every[0]
    if not configs:
        raise CaseError(f"no *_config.yaml beside {checkpoint.name} goes with its name")
    return max(configs, key=lambda path: len(path.name))


def cells_of(path: Path, vocabulary: Vocabulary) -> CellBatch:
    """Cells of an h5ad file in its order, their genes by name."""
    with h5py.File(path) as file:
        x = file["X"]
        if isinstance(x, h5py.Dataset):
            counts = np.asarray(x)
        else:
            matrix = sp.csc_matrix if x.attrs["encoding-type"] == "csc_matrix" else sp.csr_matrix
            counts = matrix((x["data"][:], x["indices"][:], x["indptr"][:]), shape=x.attrs["shape"]).toarray()
    column = {name: i for i, name in enumerate(read_genes(path).feature_ids)}
    order = [column[name] for name in vocabulary.feature_ids]
    return CellBatch.from_dense(torch.from_numpy(counts[:, order]).float())


def _check_outputs(case: Case, ledger: Ledger, name: str, models: Models, first: Models, cells: CellBatch) -> None:
    """Compare the outputs of a checkpoint, if it holds the weights that they were recorded with."""
    with torch.no_grad():
        if not _same_weights(models.vae, first.vae):
            ledger.same(f"{name} VAE: other weights, nothing recorded", True, True)
            return
        z = models.vae.encode(cells)
        decoded = models.vae.decode(z, cells.library_size)
        outputs = {"h_z": z, "mu": decoded.mu}
        if "out/theta" in case.tensors and isinstance(decoded, CountDistribution):
            outputs["theta"] = decoded.theta.expand_as(decoded.mu)
        x, t = case.tensors["out/h_z"], case.tensors["in/t"]
        for key, dit, of_first in (("dit", models.raw, first.raw), ("dit_ema", models.averaged, first.averaged)):
            if dit is not None and of_first is not None and _same_weights(dit, of_first):
                outputs[key] = dit(x, t, _conditions(case, dit))
    for key, ours in outputs.items():
        if models is first:
            ledger.tensor(f"out/{key}", ours, SINGLE, name)
        else:
            ledger.value(f"out/{key} of {name}", ours, case.tensors[f"out/{key}"], SINGLE)


def _same_weights(one: torch.nn.Module, other: torch.nn.Module) -> bool:
    a, b = one.state_dict(), other.state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


def _conditions(case: Case, dit: DiT) -> dict[str, Tensor]:
    """Ids per label; a case with one label calls them in/cond."""
    if "in/cond" not in case.tensors:
        return case.under("in/cond/")
    (label,) = dit.n_classes
    return {label: case.tensors["in/cond"]}
