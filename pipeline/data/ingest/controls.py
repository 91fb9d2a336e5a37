"""Checks the control cells that a flow is to start at, before anything is trained."""

from __future__ import annotations

from pipeline.config.train import FlowStartConfig
from pipeline.data.ingest.dataset import IngestedDataset
from scldm.data.vocabulary import UnknownNameError
from scldm.errors import InputError

SHOWN = 5  # combinations in a note
WHERE = "train_flow.start.control"


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
        control = label.classes[int(label.encode([control])[0])]
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


def _text(others: list[str], group: object) -> str:
    assert isinstance(group, tuple)
    return ", ".join(f"{name} {value}" for name, value in zip(others, group, strict=True))
