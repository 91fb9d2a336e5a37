"""Verifies the cells of a finished stage: complete, intact and as requested. Reports all problems."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pandas as pd
from anndata.io import read_elem

from pipeline.inference.export.requested import RequestUnknown, requested_cells
from scldm.cells.cells import read_index
from scldm.cells.shards import CellShardsError, CellsManifest, Shard, read_cells_manifest
from scldm.data.cell_counts import is_log_normalised
from scldm.data.class_names import class_names

VALUES = 1 << 22  # of a matrix, checked at a time
FINITE = (
    "library_size",
    "total_counts",
    "n_genes",
    "nll",
    "nll_per_gene",
    "flow_log_prob",
)  # obs columns that must be finite
EXAMPLES = 3


@dataclass
class Verdict:
    """Result of a verification."""

    folder: str
    stage: str
    n_cells: int
    n_shards: int
    problems: list[str] = field(default_factory=list)
    not_checked: list[str] = field(default_factory=list)

    @property
    def ok(self) -> bool:
        return not self.problems

    def to_json(self) -> dict[str, Any]:
        return {**vars(self), "ok": self.ok}

    def text(self) -> str:
        head = f"{self.folder}: {self.stage}, {self.n_cells:,} cells in {self.n_shards} shards"
        lines = [f"{head}: {'complete and intact' if self.ok else f'{len(self.problems)} problems'}"]
        lines += [f"  - {p}" for p in self.problems] + [f"  not checked: {n}" for n in self.not_checked]
        return "\n".join(lines)


def verify(folder: Path) -> Verdict:
    """Read and check every byte of a stage's cells.

    Raises:
        CellShardsError: the folder holds no finished stage of cells.
    """
    manifest = read_cells_manifest(folder)
    verdict = Verdict(str(folder), manifest.stage, manifest.n_cells, len(manifest.shards))
    facts = manifest.raw["facts"]
    if facts.get("n_cells") != manifest.n_cells:
        verdict.problems.append(
            f"the manifest says n_cells {facts.get('n_cells')}, its shards sum to {manifest.n_cells}"
        )
    frames, var = [], None
    for shard in manifest.shards:
        found = _shard(shard, var, verdict.problems)
        if found is not None:
            frames.append(found[0])
            var = var if var is not None else found[1]
    if len(frames) < len(manifest.shards):
        verdict.not_checked.append("names, index and conditions, because shards are missing or damaged")
        return verdict
    obs = pd.concat(frames) if frames else pd.DataFrame()
    verdict.problems += _name_problems(obs.index)
    verdict.problems += _index_problems(manifest, obs)
    _check_request(manifest, obs, verdict)
    return verdict


# ---- one shard ---------------------------------------------------------------------------------------------------
def _shard(shard: Shard, var: pd.DataFrame | None, problems: list[str]) -> tuple[pd.DataFrame, pd.DataFrame] | None:
    """Read obs and var of a shard that matches the manifest; return None after adding to the problems."""
    name = shard.path.name
    if not shard.path.is_file():
        problems.append(f"{name} is missing")
        return None
    if (sha := shard.digest()) != shard.sha256:
        size = shard.path.stat().st_size
        problems.append(f"{name} ({size:,} bytes) has sha256 {sha[:12]}…, the manifest says {shard.sha256[:12]}…")
        return None
    try:
        with h5py.File(shard.path, "r") as f:
            obs, own_var = read_elem(f["obs"]), read_elem(f["var"])
            if len(obs) != shard.n_cells:
                problems.append(f"{name} holds {len(obs):,} cells, the manifest says {shard.n_cells:,}")
            if var is not None and not own_var.equals(var):
                problems.append(f"{name} has other genes than the first shard")
            counts = not is_log_normalised(read_elem(f["uns"]) if "uns" in f else {})
            problems += [f"{name}: {p}" for p in _contents(f, obs, len(own_var), counts=counts)]
            return obs, own_var
    except (OSError, KeyError, ValueError) as error:
        problems.append(f"{name} cannot be read as .h5ad ({str(error).splitlines()[0]})")
        return None


def _contents(f: h5py.File, obs: pd.DataFrame, n_genes: int, *, counts: bool) -> Iterator[str]:
    for column in (c for c in FINITE if c in obs):
        bad = ~np.isfinite(obs[column].to_numpy(float))
        if bad.any():
            yield f"obs {column} is not finite in {int(bad.sum())} cells (first: {obs.index[bad][0]})"
    if "X" in f:
        yield from _values(f["X"], obs, n_genes, counts=counts)
    for place in ("obsm", "layers"):
        for key, values in f.get(place, {}).items():
            rows = max(1, VALUES // max(1, int(np.prod(values.shape[1:]))))
            bad = sum(int((~np.isfinite(values[i : i + rows])).sum()) for i in range(0, len(values), rows))
            if bad:
                yield f"{place}[{key!r}] holds {bad} values that are NaN or infinite"
            if len(values) != len(obs):
                yield f"{place}[{key!r}] has {len(values)} rows for {len(obs)} cells"


def _values(x: Any, obs: pd.DataFrame, n_genes: int, *, counts: bool) -> Iterator[str]:
    """Yield reasons why X is no CSR matrix of counts, or of finite log1p CP10k values."""
    if not isinstance(x, h5py.Group) or x.attrs.get("encoding-type") != "csr_matrix":
        yield "X is no CSR matrix"
        return
    indptr = x["indptr"][:].astype(np.int64)
    nnz = len(x["data"])
    if len(indptr) != len(obs) + 1 or indptr[0] != 0 or indptr[-1] != nnz or (np.diff(indptr) < 0).any():
        yield f"X has no valid row offsets for {len(obs)} cells and {nnz} values"
        return
    bad: dict[str, int] = {}
    totals = np.zeros(len(obs))
    for start in range(0, nnz, VALUES):
        values, genes = x["data"][start : start + VALUES], x["indices"][start : start + VALUES]
        finite = np.isfinite(values)
        faults = {
            "NaN or infinite": ~finite,
            "negative": counts & (values < 0),
            "not whole numbers": counts & finite & (values != np.rint(values)),
            "of genes that do not exist": (genes < 0) | (genes >= n_genes),
        }
        for what, mask in faults.items():
            bad[what] = bad.get(what, 0) + int(mask.sum())
        cell = np.searchsorted(indptr, np.arange(start, start + len(values)), side="right") - 1
        totals += np.bincount(cell, values, minlength=len(obs))
    yield from (f"{n} values of X are {what}" for what, n in bad.items() if n)
    if "total_counts" in obs and (wrong := totals != obs["total_counts"].to_numpy(float)).any():
        yield f"total_counts differs from the sum of X in {int(wrong.sum())} cells (first: {obs.index[wrong][0]})"


# ---- all shards --------------------------------------------------------------------------------------------------
def _name_problems(names: pd.Index) -> Iterator[str]:
    twice = names[names.duplicated()].unique()
    if len(twice):
        yield f"{len(twice)} obs names occur more than once (first: {', '.join(map(str, twice[:EXAMPLES]))})"


def _index_problems(manifest: CellsManifest, obs: pd.DataFrame) -> Iterator[str]:
    if manifest.index is None:
        return
    try:
        index = read_index(manifest.index)
    except CellShardsError as error:
        yield str(error)
        return
    if not index.index.equals(obs.index.astype(str)):
        yield f"{manifest.index.name} does not list the cells of the shards in order"


def _check_request(manifest: CellsManifest, obs: pd.DataFrame, verdict: Verdict) -> None:
    """Compare the number of cells of each condition with the request."""
    if manifest.stage != "generate":
        return
    try:
        wanted = requested_cells(manifest)
    except RequestUnknown as reason:
        verdict.not_checked.append(f"cells per condition: {reason}")
        return
    labels = list(next(iter(wanted), ()))
    names = [label for label, _ in labels]
    columns = [class_names(obs[n]) for n in names]
    keys = [tuple(zip(names, row, strict=True)) for row in zip(*columns, strict=True)] or [()] * len(obs)
    found = pd.Series(keys, dtype=object).value_counts().to_dict()
    wrong = [k for k in {**wanted, **found} if wanted.get(k, 0) != found.get(k, 0)]
    for key in wrong[:10]:
        what = ", ".join(f"{n}={c if c is not None else '(none)'}" for n, c in key) or "no label"
        verdict.problems.append(f"{found.get(key, 0):,} cells of {what}; {wanted.get(key, 0):,} were requested")
    if len(wrong) > 10:
        verdict.problems.append(f"{len(wrong) - 10} more conditions have another number of cells than requested")
