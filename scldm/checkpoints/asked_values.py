"""Values in a request that no cell of the data had: the network and the vocabulary are extended by them.

A number, a set of known members, or a name with a vector is one more class, whose features are known; see
`scldm.data.labels.values`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace

import torch
from torch import Tensor

from scldm.checkpoints.native import LoadedFlow, class_features
from scldm.data.vocabulary import Vocabulary

Conditions = Iterable[Mapping[str, str | None]]


def with_values(flow: LoadedFlow, conditions: Conditions) -> LoadedFlow:
    """Return a flow that knows the classes of conditions, with the same weights; itself if it knows them.

    Args:
        conditions: label -> class of each row of a request, as `LabelVocabulary.asked` returns it.
    """
    vocabulary = flow.vocabulary.extended(conditions)
    if vocabulary is flow.vocabulary:
        return flow
    return replace(flow, vocabulary=vocabulary, dit=flow.dit.with_classes(class_features(vocabulary)))


def with_null_ids(conditions: Mapping[str, Tensor], before: Vocabulary, now: Vocabulary) -> dict[str, Tensor]:
    """Return class ids (b,) by label whose null ids are those of an extended vocabulary; other ids stay."""
    moved = {}
    for label, ids in conditions.items():
        old, new = before.label(label).null_id, now.label(label).null_id
        moved[label] = ids if old == new else torch.where(ids == old, new, ids)
    return moved


def value_notes(vocabulary: Vocabulary, conditions: Conditions) -> list[str]:
    """Return what a reader of generated cells should know of values that no training cell had, each once.

    Args:
        vocabulary: Of the model, extended or not.
    """
    asked = [(label, value) for row in conditions for label, value in row.items() if value is not None]
    values = vocabulary.values
    notes = (values[label].note(label, value) for label, value in dict.fromkeys(asked) if label in values)
    return [note for note in notes if note is not None]
