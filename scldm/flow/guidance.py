"""Classifier-free guidance: one function of (x, t) from a model, its conditions and a scale.

    v = v_null + w (v_cond - v_null)

joint: v_cond has all labels set, and one scale guides them together. mutually_exclusive: labels are set one at a time,
v = v_null + sum_l w_l (v_l - v_null). Either way the result is a weighted sum of network outputs; those with weight 0
are never computed (w = 1: the conditional one alone, w = 0: the null one alone), the rest are one batch.

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


class ConditionalModel(Protocol):
    """What guidance asks of a network; a DiT is one. A label absent from the conditions is null."""

    n_classes: dict[str, int]
    strategy: Literal["joint", "mutually_exclusive"]

    def __call__(self, x_t: Tensor, t: Tensor, conditions: Mapping[str, Tensor]) -> Tensor: ...


@runtime_checkable
class SharesTime(Protocol):
    """A network that saves work where all cells have one time."""

    def at_one_time(self, conditions: Mapping[str, Tensor]) -> Field: ...


@dataclass(frozen=True)
class Term:
    """One network output in the guided sum."""

    weight: float
    labels: tuple[str, ...]  # the labels that are set; the others are null


def guidance_terms(
    labels: Sequence[str],
    scale: float | Mapping[str, float],
    *,
    strategy: Literal["joint", "mutually_exclusive"],
) -> tuple[Term, ...]:
    """The network outputs to evaluate, with weights that add to 1.

    Args:
        labels: Labels of the conditions.
        scale: One scale, or one per label. For `joint` the scales of all labels must agree.
        strategy: How labels are combined.
    """
    scales = _scale_per_label(labels, scale)
    if strategy == "joint":
        if len(set(scales.values())) > 1:
            raise ValueError(f"guidance {scales}: joint conditions are guided together, by one scale")
        terms = [Term(next(iter(scales.values())), tuple(labels))] if labels else []
    else:
        terms = [Term(scales[label], (label,)) for label in labels]
    null = Term(1.0 - sum(term.weight for term in terms), ())
    kept = tuple(term for term in (null, *terms) if abs(term.weight) > 1e-12)
    return kept


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
    """The guided prediction of the network as a function of (x, t).

    Args:
        model: Network with its labels.
        conditions: Label to ids (b,), fixed for the whole solve.
        scale: Guidance scale w, or one per label.
        one_time: The caller promises that all cells have the same t whenever the field is asked, as in a solver. A
            network that can (`at_one_time`) then shares the work that depends on time and labels alone.
    """
    unknown = sorted((set(scale) if isinstance(scale, Mapping) else set()) - set(model.n_classes))
    if unknown:
        raise ValueError(f"guidance: unknown labels {unknown}; the model knows {sorted(model.n_classes)}")
    terms = guidance_terms(list(conditions), scale, strategy=model.strategy)
    ids = _stacked_ids(terms, conditions, model.n_classes)
    n = len(terms)
    network = model.at_one_time(ids) if one_time and isinstance(model, SharesTime) else _with_conditions(model, ids)
    if n == 1:
        return network

    def predict(x: Tensor, t: Tensor) -> Tensor:
        outputs = network(x.repeat(n, *[1] * (x.ndim - 1)), t.repeat(n)).chunk(n)
        return torch.stack([term.weight * output for term, output in zip(terms, outputs, strict=True)]).sum(dim=0)

    return predict


def _with_conditions(model: ConditionalModel, ids: Mapping[str, Tensor]) -> Field:
    return lambda x, t: model(x, t, ids)


def _stacked_ids(
    terms: Sequence[Term], conditions: Mapping[str, Tensor], n_classes: Mapping[str, int]
) -> dict[str, Tensor]:
    """Label to ids (n_terms b,): the cells once per term, in the order of the terms."""
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


def guided_velocity(
    model: ConditionalModel,
    conditions: Mapping[str, Tensor],
    *,
    scale: float | Mapping[str, float],
    path: PathConfig,
    one_time: bool = False,
) -> Field:
    """The guided velocity field, whatever the network predicts. Arguments as in `guided_prediction`."""
    predict = guided_prediction(model, conditions, scale=scale, one_time=one_time)
    if path.prediction == "velocity":
        return predict
    return lambda x, t: to_velocity(predict(x, t), x, t, path)
