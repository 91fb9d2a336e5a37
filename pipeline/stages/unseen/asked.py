"""What predict_error can leave out and predict, and perturb learn from, by the numbers of training cells alone.

So it is known, and refused, as soon as the data are: before a plan is shown and before Ray starts.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from pipeline.config.apply import PerturbConfig
from pipeline.config.job import PredictErrorConfig
from pipeline.core.manifest import Manifest
from pipeline.data.ingest.dataset import IngestedDataset
from pipeline.inference.models import POOLS_COUNTS, check_target, draws_counts, target_classes
from pipeline.report.combinations import JOIN
from scldm.data.class_names import class_name
from scldm.data.user_table import read_table
from scldm.data.vocabulary import UnknownNameError, Vocabulary
from scldm.errors import InputError
from scldm.metrics.perturbation.leave_out import askable, unmeasured
from scldm.metrics.perturbation.screen import MIN_CELLS, CellNumbers, Combination

SHOWN = 10  # problems in one message
GAUSSIAN = (
    "has a gaussian head, and predicted cells are compared with counts; predict_error needs a VAE with head nb_shared "
    "or nb_cell"
)


@dataclass(frozen=True)
class Measured:
    """Which combinations of a pipeline have training cells."""

    numbers: CellNumbers
    vocabulary: Vocabulary
    context: tuple[str, ...]  # labels
    treatment: tuple[str, ...]  # labels

    def pair(self, classes: Mapping[str, str]) -> Combination:
        """Return the combination of some classes, one for each label."""
        return JOIN.join(classes[x] for x in self.context), JOIN.join(classes[x] for x in self.treatment)


def measured_in(ingest: Manifest, control: Mapping[str, str]) -> Measured:
    """Count the training cells of an ingest.

    Args:
        ingest: Its manifest.
        control: Label -> control class.

    Raises:
        InputError: The control names no label or class of the data, no label is left for the context, or no training
            cell is a control.
    """
    data = IngestedDataset.open(ingest)
    control = known_control(data.vocabulary, control)
    names = [label.name for label in data.vocabulary.labels]
    context, treatment = (tuple(x for x in names if (x in control) == inside) for inside in (False, True))
    made = Measured(CellNumbers({}, JOIN.join(control[x] for x in treatment)), data.vocabulary, context, treatment)
    table = data.composition("train")
    n = {made.pair(row): int(row["n_cells"]) for row in table.to_dict("records")}
    if made.numbers.control not in {t for _, t in n}:
        raise InputError(f"control: no training cell is {made.numbers.control}; name a class that training cells have")
    return Measured(CellNumbers(n, made.numbers.control), data.vocabulary, context, treatment)


def known_control(vocabulary: Vocabulary, control: Mapping[str, str]) -> dict[str, str]:
    """Return the control classes as the data call them: B+A is A+B in a label of sets.

    Raises:
        InputError: There is no such label or class, or no label is left for the context.
    """
    found = vocabulary.classes_of(control, "control")
    if not [label for label in vocabulary.labels if label.name not in control]:
        raise InputError(
            f"control names all labels of the data ({', '.join(control)}): what is left is the context, and a "
            "combination needs one; ingest with a label for the cell type, donor or cell line too"
        )
    return found


def check_predictable(
    config: PredictErrorConfig, ingest: Manifest, vae: str | Path | None = None
) -> tuple[list[Combination], list[Combination]]:
    """Return the combinations that can be left out, and those to predict the error for.

    Args:
        config: Settings of the stage.
        ingest: Manifest of the data.
        vae: Folder of the VAE's model; None if it is not trained yet.

    Raises:
        InputError: The model or the data cannot answer; all problems are listed.
    """
    problems = [] if vae is None or draws_counts(vae) else [f"{vae} {GAUSSIAN}"]
    left_out: list[Combination] = []
    asked: list[Combination] = []
    try:
        measured = measured_in(ingest, config.control)
        left_out = askable(measured.numbers)
        require_askable(left_out, measured.numbers.control)
    except InputError as error:
        problems.append(str(error))
    else:
        try:
            asked = combinations_asked(config, measured)
        except InputError as error:
            problems.append(str(error))
    if problems:
        raise InputError("\n".join(problems))
    return left_out, asked


def check_learnable(config: PerturbConfig, ingest: Manifest, vae: str | Path | None = None) -> None:
    """Check what can be known of a job that learns from training cells, before its source is read.

    Args:
        config: Settings of a perturb job with method: pooled or shift.
        ingest: Manifest of the data.
        vae: Folder of the VAE's model; None if it is not trained yet, or not used.

    Raises:
        InputError: The model or the data cannot answer; all problems are listed.
    """
    vocabulary = Vocabulary.load(ingest.path("vocabulary"))
    problems: list[str] = []
    if config.method == "pooled" and config.model is None and vae is not None and not draws_counts(vae):
        problems.append(f"{vae}: {POOLS_COUNTS}")
    try:
        check_target(config, vocabulary)
        require_context(config.to, vocabulary, config.method)
        _require_cells_of(config, ingest, vocabulary)
    except InputError as error:
        problems.append(str(error))
    if problems:
        raise InputError("\n".join(problems))


def require_context(to: Mapping[str, object], vocabulary: Vocabulary, method: str) -> None:
    """Raise InputError if all labels change: a method that learns from other contexts needs one that stays."""
    if not [x for x in vocabulary.labels if x.name not in to]:
        raise InputError(
            f"to changes all labels of the data ({', '.join(to)}), and method: {method} learns from other contexts "
            "with the same treatment; keep a label, such as the cell type, out of it"
        )


def _require_cells_of(config: PerturbConfig, ingest: Manifest, vocabulary: Vocabulary) -> None:
    """Raise InputError if no context has enough training cells of the treatment that is asked for."""
    treatment = {k: v for k, v in target_classes(config, vocabulary).items() if v is not None}
    table = IngestedDataset.open(ingest).composition("train")
    for name, value in treatment.items():
        table = table[table[name] == value]
    context = [x.name for x in vocabulary.labels if x.name not in treatment]
    most = 0 if table.empty else int(table.groupby(context)["n_cells"].sum().max())
    if most < MIN_CELLS:
        raise InputError(
            f"to: {JOIN.join(treatment.values())} has at most {most} training cells in a context, and method: "
            f"{config.method} learns from other contexts with at least {MIN_CELLS}; ask for another class, or set "
            "method=flow"
        )


def require_askable(found: Sequence[Combination], control: str) -> None:
    """Raise InputError if no measured combination can be left out."""
    if not found:
        raise InputError(
            "no measured combination can be left out: one needs at least 20 training cells, as many control cells "
            f"({control}) of its context, and another context with its treatment and controls. Check control, or raise "
            "max_cells"
        )


def combinations_asked(config: PredictErrorConfig, measured: Measured) -> list[Combination]:
    """Return the combinations to predict the error for.

    Raises:
        InputError: Some of those that the job names cannot be predicted; all are listed with the reason.
    """
    given = _given(config, [label.name for label in measured.vocabulary.labels])
    if given is None:
        return unmeasured(measured.numbers)
    found: list[Combination] = []
    problems: list[str] = []
    for where, classes in given:
        own, wrong = _as_in_the_data(classes, measured.vocabulary, where)
        if not wrong:
            pair = measured.pair(own)
            wrong = [f"{where}: {problem}" for problem in _unpredictable(pair, measured.numbers)]
            if pair in found:
                wrong = [f"{where}: {' + '.join(pair)} is named twice; name it once"]
            found.append(pair)
        problems += wrong
    if problems:
        more = [f"and {len(problems) - SHOWN} more"] if len(problems) > SHOWN else []
        raise InputError("\n".join([*problems[:SHOWN], *more]))
    return found


def _given(config: PredictErrorConfig, labels: Sequence[str]) -> list[tuple[str, dict[str, str]]] | None:
    """Return the combinations that the job names, each with its place for messages; None if it names none."""
    if config.combinations is not None:
        return [(f"combinations[{i}]", dict(classes)) for i, classes in enumerate(config.combinations)]
    if config.conditions is None:
        return None
    table = read_table(Path(config.conditions).expanduser(), "conditions")
    where = f"conditions: {Path(config.conditions).name}, row"
    return [
        (f"{where} {i + 1}", {x: name for x in labels if x in row and (name := class_name(row[x])) is not None})
        for i, row in enumerate(table.to_dict("records"))
    ]


def _as_in_the_data(classes: dict[str, str], vocabulary: Vocabulary, where: str) -> tuple[dict[str, str], list[str]]:
    """Return classes as the data call them, and what is wrong with them."""
    names = [label.name for label in vocabulary.labels]
    problems = [f"{where} has no {name}; give a class for each label: {', '.join(names)}"
                for name in names if name not in classes]  # fmt: skip
    own: dict[str, str] = {}
    for name, value in classes.items():
        try:
            own[name] = vocabulary.label(name).class_of(value)
        except UnknownNameError as error:
            problems.append(f"{where}.{name}: {error}")
    return own, problems


def _unpredictable(pair: Combination, numbers: CellNumbers) -> Sequence[str]:
    """Return why nothing can be said of a combination; empty if something can."""
    n, control, name = numbers.n, numbers.control, " + ".join(pair)
    if pair[1] == control:
        return [f"{name} is the control itself"]
    if pair in n:
        return [f"{name} was measured: {n[pair]} training cells; ask for combinations that were not"]
    if n.get((pair[0], control), 0) < MIN_CELLS:
        return [f"{name}: {pair[0]} has {n.get((pair[0], control), 0)} control cells ({control}), and "
                f"at least {MIN_CELLS} are needed"]  # fmt: skip
    if not numbers.sources(*pair):
        return [f"{name}: no other context has {MIN_CELLS} cells of both {pair[1]} and {control}, so nothing is "
                "known of this treatment"]  # fmt: skip
    return []
