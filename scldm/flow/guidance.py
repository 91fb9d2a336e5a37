"""Classifier-free guidance: one function of (x, t) from a model, its conditions and a scale.

    v = v_null + w (v_cond - v_null)

joint: v_cond has all labels set, and one scale guides them together; a label may have a scale of its own beside it,
v = v_null + w (v_cond - v_null) + sum_l w_l (v_l - v_null), if w is named too, as JOINT. mutually_exclusive: labels are
set one at a time, v = v_null + sum_l w_l (v_l - v_null). Either way the result is a weighted sum of network outputs;
those with weight 0 are never computed (w = 1: only the conditional one, w = 0: only the null one), the rest are one
batch. A scale may also be a number for each cell (`PerCell`); then each cell brings the outputs that it needs into the
one batch, and a label that a cell does not have (its id is null) costs nothing.

Guidance acts on predictions. A velocity is an affine function of a score or a noise and the weights add to 1, so that
guiding the velocity is the same.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol, runtime_checkable

import torch
from torch import Tensor

from scldm.flow.config import PathConfig
from scldm.flow.objective import to_velocity

Field = Callable[[Tensor, Tensor], Tensor]  # (x (b, ...), t (b,)) -> (b, ...)
PerCell = Mapping[str, Tensor]  # label -> scale of each cell (b,); of joint conditions JOINT, and labels beside it
JOINT = "*"  # stands for all labels together
NAME_JOINT = (
    "they are guided together: give one scale; for scales of single labels beside it, name that of all labels together "
    f"too: {JOINT!r}, or the column guidance.{JOINT}"
)
ONE_AT_A_TIME = (
    f"{JOINT!r} is the scale of all labels together, and this flow sets one label at a time; give each label a scale"
)
NEGLIGIBLE = 1e-12  # network outputs with weights up to this are not computed


class ConditionalModel(Protocol):
    """Interface that guidance needs from a network, such as a DiT. A label absent from the conditions is null."""

    n_classes: dict[str, int]
    strategy: Literal["joint", "mutually_exclusive"]

    def __call__(self, x_t: Tensor, t: Tensor, conditions: Mapping[str, Tensor]) -> Tensor: ...


@runtime_checkable
class SharesTime(Protocol):
    """Interface of a network that can share work if all cells have one time."""

    def at_one_time(self, conditions: Mapping[str, Tensor]) -> Field:
        """Return the network with its conditions fixed, for times (b,) that are all equal."""
        ...


@dataclass(frozen=True)
class Term:
    """One network output in the guided sum."""

    weight: float
    labels: tuple[str, ...]  # labels that are set; the others are null


def guidance_terms(
    labels: Sequence[str],
    scale: float | Mapping[str, float],
    *,
    strategy: Literal["joint", "mutually_exclusive"],
) -> tuple[Term, ...]:
    """Return the network outputs to evaluate, with weights that add up to 1.

    Args:
        labels: Labels of the conditions.
        scale: One scale, or one per label. For `joint` either the scale of all labels together, {JOINT: w}, and any of
            single labels beside it; or, without JOINT, one scale for each label, all equal, which is that of all
            labels together.
        strategy: How labels are combined.
    """
    if strategy == "joint":
        terms = [Term(w, of) for of, w in _joint_weights(labels, scale).items()]
    else:
        if isinstance(scale, Mapping) and JOINT in scale:
            raise ValueError(f"guidance {dict(scale)}: {ONE_AT_A_TIME}")
        scales = _scale_per_label(labels, scale)
        terms = [Term(scales[label], (label,)) for label in labels]
    null = Term(1.0 - sum(term.weight for term in terms), ())
    kept = tuple(term for term in (null, *terms) if abs(term.weight) > NEGLIGIBLE)
    return kept


def _joint_weights(labels: Sequence[str], scale: float | Mapping[str, float]) -> dict[tuple[str, ...], float]:
    """Return the weights of the outputs with all labels and with single ones."""
    if not labels:
        return {}
    if not isinstance(scale, Mapping) or JOINT not in scale:
        scales = _scale_per_label(labels, scale)
        if len(set(scales.values())) > 1:
            raise ValueError(f"guidance {scales}: this flow was trained with joint labels: {NAME_JOINT}")
        return {tuple(labels): next(iter(scales.values()))}
    weights = {tuple(labels): float(scale[JOINT])}
    for label in labels:  # a single label is all labels
        weights[label,] = weights.get((label,), 0.0) + float(scale.get(label, 0.0))
    return weights


def _scale_per_label(labels: Sequence[str], scale: float | Mapping[str, float]) -> dict[str, float]:
    if not isinstance(scale, Mapping):
        return dict.fromkeys(labels, float(scale))
    missing = sorted(set(labels) - set(scale))
    if missing:
        raise ValueError(f"guidance has no scale for the labels {missing}; it has {dict(scale)}")
    return {label: float(scale[label]) for label in labels}


def guided_prediction(
    model: ConditionalModel,
    conditions: Mapping[str, Tensor],
    *,
    scale: float | Mapping[str, float],
    one_time: bool = False,
) -> Field:
    """Return the guided prediction of the network as a function of (x, t).

    Args:
        model: Network with its labels.
        conditions: Label to ids (b,), fixed for the whole solve.
        scale: Guidance scale w, or one per label.
        one_time: Whether all cells have the same t in every evaluation, as in a solver. A
            network that can (`at_one_time`) then shares the work that depends on time and labels alone.
    """
    unknown = sorted((set(scale) if isinstance(scale, Mapping) else set()) - {JOINT} - set(model.n_classes))
    if unknown:
        raise ValueError(f"guidance: unknown labels {unknown}; the model knows {sorted(model.n_classes)}")
    terms = guidance_terms(list(conditions), scale, strategy=model.strategy)
    ids = _stacked_ids(terms, conditions, model.n_classes)
    n = len(terms)
    network = model.at_one_time(ids) if one_time and isinstance(model, SharesTime) else _with_conditions(model, ids)
    if n == 1:
        return network

    def field(x: Tensor, t: Tensor) -> Tensor:
        outputs = network(x.repeat(n, *[1] * (x.ndim - 1)), t.repeat(n)).chunk(n)
        return torch.stack([term.weight * output for term, output in zip(terms, outputs, strict=True)]).sum(dim=0)

    return field


def _with_conditions(model: ConditionalModel, ids: Mapping[str, Tensor]) -> Field:
    return lambda x, t: model(x, t, ids)


def _stacked_ids(
    terms: Sequence[Term], conditions: Mapping[str, Tensor], n_classes: Mapping[str, int]
) -> dict[str, Tensor]:
    """Return label to ids (n_terms b,): the cells once per term, in the order of the terms."""
    used = {label for term in terms for label in term.labels}
    unknown = sorted(used - set(n_classes))
    if unknown:
        raise ValueError(f"conditions: unknown labels {unknown}; the model knows {sorted(n_classes)}")
    return {
        label: torch.cat(
            [ids if label in term.labels else torch.full_like(ids, n_classes[label]) for term in terms], dim=0
        )
        for label, ids in conditions.items()
        if label in used
    }


def per_cell_prediction(
    model: ConditionalModel, conditions: Mapping[str, Tensor], scale: PerCell, *, one_time: bool = False
) -> Field:
    """Return the guided prediction with scales of each cell. Reads ids and scales on the host, once.

    Args:
        model: Network with its labels.
        conditions: Label to ids (b,); the null id if a cell has no such label.
        scale: Scales of each label, (b,) each; {JOINT: (b,)} if labels are joint, and any of single labels beside it.
        one_time: As in `guided_prediction`.
    """
    joint = model.strategy == "joint"
    expected = {JOINT} if joint else set(conditions)
    if set(scale) - (set(conditions) if joint else set()) != expected:
        raise ValueError(f"scales must be given for {sorted(expected)} ({model.strategy}); got {sorted(scale)}")
    parts = _cells_of_terms(conditions, scale, model)
    stacked = torch.cat([rows for _, rows, _ in parts])
    ids = {
        label: torch.cat([
            own[rows] if label in labels else torch.full_like(own[rows], model.n_classes[label])
            for labels, rows, _ in parts
        ])
        for label, own in conditions.items()
    }  # fmt: skip
    network = model.at_one_time(ids) if one_time and isinstance(model, SharesTime) else _with_conditions(model, ids)
    n_cells = len(next(iter(scale.values()), stacked))
    if len(parts) == 1 and len(stacked) == n_cells and bool((parts[0][2] == 1).all()):
        return network  # every cell once, in order

    def field(x: Tensor, t: Tensor) -> Tensor:
        outputs = network(x[stacked], t[stacked])
        total = torch.zeros_like(x, dtype=outputs.dtype)
        start = 0
        for _, rows, weight in parts:  # one term after the other: a sum in a fixed order, on a GPU too
            part = outputs[start : start + len(rows)]
            total[rows] += weight.to(part.dtype).view(-1, *[1] * (x.ndim - 1)) * part
            start += len(rows)
        return total

    return field


def _cells_of_terms(
    conditions: Mapping[str, Tensor], scale: PerCell, model: ConditionalModel
) -> list[tuple[tuple[str, ...], Tensor, Tensor]]:
    """Return terms as (labels that are set, cells that need it, their weights); the weights of a cell add up to 1."""
    given = {label: ids != model.n_classes[label] for label, ids in conditions.items()}
    if model.strategy == "joint":
        weights = _joint_weights_of_cells(given, scale)
    else:
        weights = [((label,), torch.where(given[label], scale[label].double(), 0.0)) for label in conditions]
    if not weights:
        raise ValueError("scales of each cell need at least one label")
    null = 1 - torch.stack([w for _, w in weights]).sum(0)
    found = []
    for labels, weight in [((), null), *weights]:
        rows = (weight.abs() > NEGLIGIBLE).nonzero().squeeze(1)
        if len(rows):
            found.append((labels, rows, weight[rows]))
    return found


def _joint_weights_of_cells(given: Mapping[str, Tensor], scale: PerCell) -> list[tuple[tuple[str, ...], Tensor]]:
    """Return the weights of the outputs with all labels and with single ones, (b,) each.

    Args:
        given: Which cells have a label, bool (b,) each.
    """
    if not given:
        return [((), torch.zeros_like(scale[JOINT], dtype=torch.float64))]
    n_given = torch.stack(list(given.values())).sum(0)
    together = torch.where(n_given > 0, scale[JOINT].double(), 0.0)
    single = []
    for label in (x for x in given if x in scale):
        own = torch.where(given[label], scale[label].double(), 0.0)
        together = together + torch.where(n_given == 1, own, 0.0)  # a cell's only label is all of its labels
        single.append(((label,), torch.where(n_given == 1, 0.0, own)))
    return [(tuple(given), together), *single]


def guided_velocity(
    model: ConditionalModel,
    conditions: Mapping[str, Tensor],
    *,
    scale: float | Mapping[str, float] | PerCell,
    path: PathConfig,
    one_time: bool = False,
) -> Field:
    """Return the guided velocity field, whatever the network predicts.

    Arguments as in `guided_prediction`; `scale` may also hold scales of each cell (`PerCell`).
    """
    if isinstance(scale, Mapping) and any(isinstance(w, Tensor) for w in scale.values()):
        field = per_cell_prediction(model, conditions, scale, one_time=one_time)
    else:
        field = guided_prediction(model, conditions, scale=scale, one_time=one_time)
    if path.prediction == "velocity":
        return field
    return lambda x, t: to_velocity(field(x, t), x, t, path)
