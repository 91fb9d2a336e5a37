"""Real cells under another condition: what a perturb job and `Model.perturb` both compute for a tile of cells.

A cell starts at its own latents, either straight (`control`, by the flow that was trained from control cells) or by way
of the noise that they correspond to (`latents`); or at new noise (`noise`).

Shape letters: b cells, g genes, m latent tokens, e latent width.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import scipy.sparse as sp
import torch
from torch import Tensor

from scldm.checkpoints.asked_values import with_null_ids
from scldm.checkpoints.native import LoadedFlow, LoadedVAE
from scldm.data.batch import CellBatch
from scldm.flow.config import ControlStart, Distilled, SamplerConfig
from scldm.flow.distilled import whole_flow_problem
from scldm.flow.sampler import sample_latents
from scldm.flow.transport import FromControls, Start, start_problem
from scldm.generation.draws.change import Change
from scldm.generation.draws.changed_counts import change_counts
from scldm.generation.real_cells import draw_sparse, fresh_noise, require_whole_flow, under_condition
from scldm.nn.vae import CountDistribution, ExpressionDistribution

KEPT, ADDED = 24, 25  # streams of a cell's randomness, beside those of `real_cells`
Counts = Literal["drawn", "changed"]


@dataclass(frozen=True)
class Perturbation:
    """What is done to cells."""

    to: Mapping[str, str | None]  # label -> new class; None: without the label
    start: Start
    counts: Counts
    sampler: SamplerConfig  # its guidance applies to the integration under the new labels
    seed: int


def perturb_problems(
    to: Mapping[str, str | None], wanted: Start, start: ControlStart | None, *, counts: Counts, draws_counts: bool,
    distilled: Distilled | None = None,
) -> list[str]:  # fmt: skip
    """Return why a flow cannot move cells as requested.

    Args:
        to: Label -> new class.
        wanted: Where cells start.
        start: What the flow was trained from beside noise.
        counts: How counts are made.
        draws_counts: Whether the VAE draws counts.
        distilled: Of a flow that was distilled, which moves no cells.
    """
    if problem := whole_flow_problem(distilled, "a perturbation"):
        return [problem]
    problems = [] if (problem := start_problem(start, wanted)) is None else [problem]
    if wanted == "control" and start is not None and set(to) != {start.label}:
        others = ", ".join(sorted(set(to) - {start.label}))
        problems.append(
            f"start (control) carries control cells to another {start.label} and keeps their other labels; `to` "
            + (f"names {others}" if others else f"names no {start.label}")
            + f": give it {start.label} alone, or set start=latents"
        )
    if counts == "changed" and not draws_counts:
        problems.append(
            "counts (changed) adds and removes molecules, and the VAE has a gaussian head, which models log1p CP10k "
            "values; set counts=drawn"
        )
    return problems


def not_controls(classes: Sequence[str | None], names: Sequence[str], start: ControlStart) -> str | None:
    """Return which cells are no control cells, by class; None if all are.

    Args:
        classes: Class of each cell under the label of the treatment; None: it has none.
        names: Of the cells.
    """
    found: dict[str, list[str]] = {}
    for own, name in zip(classes, names, strict=True):
        if own != start.control:
            found.setdefault("none" if own is None else repr(own), []).append(str(name))
    if not found:
        return None
    listed = ", ".join(f"{own} ({len(of):,} cells, first: {of[0]})" for own, of in sorted(found.items())[:10])
    more = f" and {len(found) - 10} more classes" if len(found) > 10 else ""
    n = sum(map(len, found.values()))
    return (
        f"start (control) carries cells whose {start.label} is {start.control!r}, and {n:,} of {len(names):,} cells "
        f"have another: {listed}{more}"
    )


@dataclass(frozen=True)
class Moved:
    """Cells under other labels, before their counts are drawn."""

    own: Tensor | None  # latents of the cells, (b, m, e); None if they start at new noise
    latents: Tensor  # under the new labels, (b, m, e)
    decoded: CountDistribution | ExpressionDistribution  # of the latents


@torch.inference_mode()
def move_cells(
    vae: LoadedVAE, flow: LoadedFlow, cells: CellBatch, seen: CellBatch, perturbation: Perturbation
) -> Moved:
    """Return the latents of cells under other labels, and what the decoder makes of them.

    Args:
        flow: Knows the classes of `perturbation`, see `asked_values.with_values`.
        cells: Cells with all counts and with their own class ids of the VAE's vocabulary, on the device.
        seen: The same cells as the encoder sees them.
        perturbation: What is done to them.
    """
    require_whole_flow(flow, "a perturbation")
    how, conditions = perturbation, with_null_ids(cells.conditions, vae.vocabulary, flow.vocabulary)
    target = dict(conditions)
    for name, value in how.to.items():
        new = int(flow.vocabulary.label(name).encode([value])[0])
        target[name] = torch.full_like(conditions[name], new)
    own = None
    if how.start == "noise":
        noise = fresh_noise(flow, cells.joinids.tolist(), seed=how.seed).to(cells.library_size.device)
        z = sample_latents(flow.dit, noise, target, how.sampler, flow.path)
    else:
        own = vae.vae.encode(seen)
        if how.start == "control":
            z = sample_latents(FromControls(flow.dit), own, target, how.sampler, flow.path)
        else:
            z = under_condition(flow, own, own=conditions, target=target, sampler=how.sampler)
    return Moved(own, z, vae.vae.decode(z, cells.library_size))


@torch.inference_mode()
def perturb_cells(
    vae: LoadedVAE,
    flow: LoadedFlow,
    cells: CellBatch,
    seen: CellBatch,
    perturbation: Perturbation,
    factors: np.ndarray | None = None,
) -> tuple[sp.csr_matrix, Tensor]:
    """Return the values of cells under other labels, (b, g), and their latents, (b, m, e).

    Args:
        cells: Cells with all counts and with their own class ids, on the device.
        seen: The same cells as the encoder sees them.
        perturbation: What is done to them.
        factors: Of the decoder's means under the new labels, (b, g), where counts are changed; see `matched_mean`.
    """
    ids, moved = cells.joinids.tolist(), move_cells(vae, flow, cells, seen, perturbation)
    if perturbation.counts == "drawn" or moved.own is None or not isinstance(moved.decoded, CountDistribution):
        return draw_sparse(moved.decoded, ids, seed=perturbation.seed), moved.latents
    change = change_of_means(vae, cells, moved)
    if factors is not None:
        change = change.times(factors)
    changed = change_counts(change, ids, seed=perturbation.seed, kept_stream=KEPT, added_stream=ADDED)
    return changed, moved.latents


@torch.inference_mode()
def change_of_means(vae: LoadedVAE, cells: CellBatch, moved: Moved) -> Change:
    """Return counts of cells, and what the decoder expects for their own and for the moved latents, float32.

    Raises:
        FloatingPointError: Means are not finite; the cells are named.
    """
    assert moved.own is not None  # cells from noise have no latents of their own
    own = vae.vae.decode(moved.own, cells.library_size)
    assert isinstance(own, CountDistribution)  # `perturb_problems` refuses others
    before, after = own.mu, moved.decoded.mu
    _require_finite(cells.joinids.tolist(), before, after)
    theta = own.theta if own.theta.ndim > 1 else own.theta[None]
    return Change(*(x.float().cpu().numpy() for x in (cells.dense(after.shape[1]), before, after, theta)))


def _require_finite(ids: Sequence[int], *means: Tensor) -> None:
    finite = torch.stack([torch.isfinite(x).all(1) for x in means]).all(0).cpu().numpy()
    if not finite.all():
        bad = np.asarray(ids)[~finite][:5].tolist()
        raise FloatingPointError(f"the decoder gave no finite means for cells {bad}; the model is not usable")
