"""Checks the control cells that a flow starts at, and those that a report compares with, before anything is trained."""

from __future__ import annotations

from collections.abc import Mapping

from pipeline.config.train import FlowStartConfig
from pipeline.data.ingest.dataset import IngestedDataset
from pipeline.data.ingest.held_out import held_out_groups
from scldm.data.vocabulary import UnknownNameError
from scldm.errors import InputError

SHOWN = 5  # combinations in a note
WHERE = "train_flow.start.control"
COMPARED = "evaluate.control"


def check_controls(config: FlowStartConfig, data: IngestedDataset) -> list[str]:
    """Check that training cells have control cells to start at.

    Returns:
        Notes: the cells whose other labels no control cell has, and which start at noise.

    Raises:
        InputError: There is no such label or class, no training cell has it, or no other cell could start there.
    """
    [(name, control)] = config.control.items()
    try:
        label = data.vocabulary.label(name)
        control = label.class_of(control)
    except UnknownNameError as error:
        raise InputError(f"{WHERE}: {error}") from error
    cells = data.composition("train", replayed=True)
    others = [x.name for x in data.vocabulary.labels if x.name != name]
    is_control = (cells[name] == control).to_numpy()
    if not is_control.any():
        raise InputError(
            f"{WHERE}: no training cell has {name} {control!r}, at which the others are to start; name another class, "
            "lower the shares that ingest.split holds out, or leave train_flow.start out"
        )
    with_controls = set(map(tuple, cells.loc[is_control, others].to_numpy().tolist()))
    treated = cells[~is_control]
    groups = [tuple(row) for row in treated[others].to_numpy().tolist()]
    lacking = treated.assign(group=groups)[[g not in with_controls for g in groups]]
    if len(treated) and len(lacking) == len(treated):
        raise InputError(
            f"{WHERE}: no combination of {' and '.join(others)} has both training cells of {name} {control!r} and of "
            "another class, so no treated cell could start at a control cell; give the source control cells of the "
            "same combinations, leave out the label that differs (ingest.labels), or leave train_flow.start out"
        )
    if lacking.empty:
        return []
    count = lacking.groupby("group")["n_cells"].sum().sort_values(ascending=False)
    first = "; ".join(f"{_text(others, group)} ({n:,} cells)" for group, n in count.head(SHOWN).items())
    more = f"; and {len(count) - SHOWN} more" if len(count) > SHOWN else ""
    return [
        f"{int(count.sum()):,} training cells have no control cells ({name} {control}) with the same other labels, and "
        f"start at noise: {first}{more}."
    ]


def check_compared_controls(control: Mapping[str, str], data: IngestedDataset) -> None:
    """Check that every combination that was held out for the test has control cells to be compared with.

    Args:
        control: Label -> control class, `evaluate.control`.

    Raises:
        InputError: There is no such label or class, or the contexts of some combinations have no training cell of the
            control; all are listed.
    """
    control = data.vocabulary.classes_of(control, COMPARED)
    labels = [x.name for x in data.vocabulary.labels]
    context = [x for x in labels if x not in control]
    known = data.composition("train", replayed=True)
    for name, value in control.items():
        known = known[known[name] == value]
    with_controls = set(map(tuple, known[context].to_numpy().tolist()))
    lacking = []
    for group in held_out_groups(data, "test"):
        own = tuple(group[x] for x in context)
        if any(group[name] != value for name, value in control.items()) and own not in with_controls:
            lacking.append(_text(labels, tuple(group[x] for x in labels)))
    if lacking:
        more = f"; and {len(lacking) - SHOWN} more" if len(lacking) > SHOWN else ""
        raise InputError(
            f"{COMPARED}: held-out combinations have no training cells of the control "
            f"({_text(list(control), tuple(control.values()))}) with the same {' and '.join(context)}, so no shift can "
            f"be compared: {'; '.join(lacking[:SHOWN])}{more}. Hold other combinations out, give the source such "
            f"control cells, or leave {COMPARED} out"
        )


def _text(others: list[str], group: object) -> str:
    assert isinstance(group, tuple)
    return ", ".join(f"{name} {value}" for name, value in zip(others, group, strict=True))
