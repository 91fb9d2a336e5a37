"""Options that `scldm generate`, `scldm embed` and `scldm perturb` share, and how they load a model."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from scldm.errors import InputError

if TYPE_CHECKING:
    from scldm.api.model import Model

ModelPlace = Annotated[
    str,  # a Path would change hf://
    typer.Argument(
        metavar="MODEL", help="A pipeline (runs/demo), a stage, a model folder, models:/…, hf://… or s3://…."
    ),
]
CellsFile = Annotated[Path, typer.Argument(metavar="CELLS", help="An .h5ad file of cells with raw counts.")]
Seed = Annotated[int, typer.Option(min=0, max=2**64 - 1, help="Of noise and counts: another seed, other cells.")]
Guidance = Annotated[
    list[str] | None,
    typer.Option(metavar="NUMBER", help="Scale of guidance, or LABEL=NUMBER for each label; repeatable. Default: 1."),
]
Device = Annotated[str, typer.Option(help="cpu, cuda or cuda:1; auto: a GPU if there is one.")]
Force = Annotated[bool, typer.Option("--force", help="Replace the file if it exists.")]
Layer = Annotated[str | None, typer.Option(help="Layer of the counts, raw for adata.raw. Default: X.")]
Genes = Annotated[
    str | None, typer.Option(metavar="COLUMN", help="var column of gene ids or symbols. Default: the index.")
]
MaxMissing = Annotated[
    float, typer.Option(min=0, max=1, help="Largest fraction of the model's genes that the file may lack.")
]


class PrecisionName(StrEnum):
    fp32 = "fp32"
    tf32 = "tf32"
    bf16 = "bf16"


class MatchBy(StrEnum):
    id = "id"
    symbol = "symbol"


Precision = Annotated[
    PrecisionName | None, typer.Option(help="Of the networks' products. Default: fp32 on a CPU, bf16 on a GPU.")
]
Match = Annotated[MatchBy, typer.Option(help="How genes are matched.")]
NAMED = re.compile(r"(?<![\w.])(layer|genes|match|max_missing|unknown_labels|start|counts|guidance|device|precision)="
                   r"(?:'([^']*)'|\"([^\"]*)\"|([\d.]+))")  # fmt: skip


def load_model(place: str, device: str, precision: PrecisionName | None, problems: list[str]) -> Model | None:
    """Load a model; None after a problem, which is added to the list."""
    from scldm.api.model import load

    try:
        return load(place, device=device, precision=None if precision is None else precision.value)
    except InputError as error:
        problems.append(as_options(str(error)))
        return None


def require_flow(model: Model, place: str, problems: list[str]) -> None:
    """Add a problem if the model has no flow."""
    if model.flow is None:
        problems.append(
            f"{place} has a VAE and no flow, and cells are made by one; name a pipeline with a finished train_flow, or "
            "a folder with vae/ and flow/"
        )


def raise_problems(problems: list[str]) -> None:
    """Raise InputError with all problems, if there are any."""
    if problems:
        raise InputError("\n".join(dict.fromkeys(problems)))


@contextmanager
def told_as_options() -> Iterator[None]:
    """Write errors of the model's methods with the options of a command in place of arguments."""
    try:
        yield
    except InputError as error:
        raise InputError(as_options(str(error))) from error


def as_options(text: str) -> str:
    """Write `max_missing=0.3` as `--max-missing 0.3`, for arguments that are options of these commands."""
    return NAMED.sub(lambda m: f"--{m[1].replace('_', '-')} {m[2] or m[3] or m[4]}", text)


def read_guidance(texts: list[str] | None, labels: list[str], problems: list[str]) -> dict[str, float] | float | None:
    """Return a scale, or scales by label; None if none is given.

    Args:
        labels: Names of the model's labels.
    """
    from scldm.generation.request_table import check_guidance

    found: dict[str, float] = {}
    for text in texts or []:
        name, _, scale = text.rpartition("=")
        try:
            found[name] = float(scale)
        except ValueError:
            problems.append(f"--guidance takes a number or LABEL=NUMBER; got {text!r}")
            found[name] = 1.0  # so that the labels of the others are checked
    if not found:
        return None
    if "" in found:
        if len(found) > 1:
            problems.append("--guidance: one scale for all labels, or LABEL=NUMBER for each; not both")
        return found[""]
    problems += [p.replace("generate.sampler.guidance", "--guidance") for p in check_guidance(found, labels)]
    return found
