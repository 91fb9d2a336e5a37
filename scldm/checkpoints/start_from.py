"""Start a network from the weights of another one, whose genes or labels may differ.

What has a gene or a class of its own (embeddings, gene biases, dispersions) is matched by name; all else must have the
same shape. What has no counterpart is given the value at which the network does what the other one did, as far as that
exists: a new gene the mean embedding (or the one that its vector predicts, `gene_vectors`), a new class the null class,
a new label zeros.

Shape letters: g genes, k classes of a label (and the null class), d model width.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from scldm.checkpoints.gene_vectors import GeneVectors, predict_embeddings
from scldm.checkpoints.native import LoadedFlow, LoadedVAE
from scldm.data.labels.values import Sets
from scldm.data.vocabulary import LabelVocabulary, Vocabulary
from scldm.errors import CheckpointError, InputError
from scldm.flow.distilled import whole_flow_problem
from scldm.nn.dit import DiT, label_table_name
from scldm.nn.vae import VAE
from scldm.optim.config import LoraConfig
from scldm.optim.lora import add_adapters
from scldm.optim.rates import old_row_factors
from scldm.text import choices_hint

EMBEDDINGS = ("gene_embedding", "decoder_embedding")  # (g, d)
PER_GENE = (*EMBEDDINGS, "log_theta", "gene_bias")
WORDS = {"number": "a number", "set": "a set", "vector": "names with vectors"}
HEAD = ("decoder.head.", "log_theta", "gene_bias")  # differ between likelihoods
FROM_CONTROLS = "from_controls"  # the vector of cells that start at control cells; zeros if the other flow has none
SHOWN = 5
MIN_SHARED = 0.1  # of the genes of the model or of the data, whichever are fewer
ALL_ROWS = torch.tensor(True)


@dataclass
class Started:
    """What a network took over, for the facts of its stage and for the log."""

    parameters: int = 0  # numbers that were taken over
    new: list[str] = field(default_factory=list)  # parameters that the other network lacks
    dropped: list[str] = field(default_factory=list)  # its parameters that this network lacks
    genes: dict[str, int] = field(default_factory=dict)  # kept, new, dropped
    classes: dict[str, dict[str, Any]] = field(default_factory=dict)  # label -> kept, new, dropped, parents
    gene_vectors: dict[str, dict[str, float]] = field(default_factory=dict)  # table -> genes, explained: by vectors
    frozen: list[str] = field(default_factory=list)  # parameters that are not trained
    adapters: dict[str, int] = field(default_factory=dict)  # rank, and trained: numbers that are trained
    old_learning_rate: float | None = None  # of what was taken over, relative to what is new; None: the same
    old_rows: dict[str, Tensor] = field(default_factory=dict, repr=False)  # parameter -> rows taken over, () for all

    def lines(self) -> list[str]:
        """Return it in words."""
        lines = [f"{self.parameters:,} numbers are taken over"]
        if self.genes:
            lines[0] += "; genes: {kept:,} kept, {new:,} new, {dropped:,} dropped".format(**self.genes)
        for name, found in self.gene_vectors.items():
            lines.append(
                "{}: {genes:,} new genes start where their vector predicts ({explained:.0%} of the variance of known "
                "genes, each left out in turn), the others at the mean".format(name, **found)
            )
        for label, n in self.classes.items():
            lines.append(
                f"{label}: {n['kept']} classes kept, {_named(n['new'], 'new')}, {_named(n['dropped'], 'dropped')}"
            )
        for what, names in (("new", self.new), ("dropped", self.dropped), ("frozen", self.frozen)):
            if names:
                lines.append(f"{what} parameters: {', '.join(names[:SHOWN])}" + (" …" if len(names) > SHOWN else ""))
        if self.adapters:
            lines.append("adapters of rank {rank}: {trained:,} numbers are trained".format(**self.adapters))
        if self.old_learning_rate is not None:
            lines.append(f"what was taken over is trained at {self.old_learning_rate:g} of the learning rate")
        return lines

    def facts(self) -> dict[str, Any]:
        """Return it as plain data."""
        unset = {k for k in ("old_learning_rate", "gene_vectors") if not getattr(self, k)}
        return {k: v for k, v in vars(self).items() if k not in {"old_rows", *unset}}


def start_vae(
    vae: VAE, vocabulary: Vocabulary, source: LoadedVAE, *, gene_vectors: GeneVectors | None = None
) -> Started:
    """Give a new VAE the weights of another one, in place.

    The VAE was initialised for its own data (`VAE.start_at`), from which new genes take their bias.

    Args:
        vae: The VAE that starts.
        vocabulary: Its genes.
        source: The VAE whose weights it takes.
        gene_vectors: Vectors of genes, which predict the embeddings of new ones; None: new genes start at the mean.

    Raises:
        CheckpointError: The sizes differ, or the two have no gene in common.
    """
    places = shared_genes(source.vocabulary, vocabulary)
    n_kept = int((places >= 0).sum())
    started = Started(
        genes={
            "kept": n_kept,
            "new": vocabulary.n_genes - n_kept,
            "dropped": source.vocabulary.n_genes - n_kept,
        }
    )
    other_head = vae.config.head != source.vae.config.head
    state, old = vae.state_dict(), source.vae.state_dict()
    for name, tensor in state.items():
        if name not in old or (other_head and name.startswith("decoder.head.")):
            started.new.append(name)
        elif name in PER_GENE:
            started.parameters += _take_genes(name, tensor, old[name], places)
            started.old_rows[name] = places >= 0
        else:
            started.parameters += _take(name, tensor, old[name])
            started.old_rows[name] = ALL_ROWS
    started.dropped += [name for name in old if name not in state]
    _require_known(started, allowed=HEAD)
    if gene_vectors is not None:
        _predict_genes(state, vocabulary, source, places, gene_vectors, started)
    return started


@torch.no_grad()
def _predict_genes(
    state: Mapping[str, Tensor],
    vocabulary: Vocabulary,
    source: LoadedVAE,
    places: Tensor,
    vectors: GeneVectors,
    started: Started,
) -> None:
    """Set the embeddings of new genes that have a vector."""
    rows = (places < 0).nonzero().squeeze(1)
    hits = {by: sum(vectors.of(getattr(source.vocabulary, by))[0]) for by in ("feature_ids", "feature_names")}
    by = "feature_names" if hits["feature_names"] > hits["feature_ids"] else "feature_ids"  # a table has one of both
    known_ids, own = getattr(source.vocabulary, by), getattr(vocabulary, by)
    ids = [own[i] for i in rows.tolist()]
    if not ids:
        raise CheckpointError("gene_embeddings: the model has every gene already; leave it out")
    for name in (n for n in EMBEDDINGS if n in state):
        table = source.vae.state_dict()[name].double().cpu().numpy()
        try:
            found = predict_embeddings(vectors, known_ids, table, ids)
        except InputError as error:
            raise CheckpointError(f"gene_embeddings: {error}") from error
        state[name][rows[torch.from_numpy(found.known)]] = torch.from_numpy(found.values).to(state[name])
        started.gene_vectors[name] = {"genes": int(found.known.sum()), "explained": round(found.explained, 4)}


def shared_genes(model: Vocabulary, data: Vocabulary) -> Tensor:
    """Return the position in the model of each gene of the data, (g,); -1 for those that it lacks.

    Raises:
        CheckpointError: They share less than MIN_SHARED of the smaller set: a start from such a model loads next to
            nothing.
    """
    places = _positions(model.feature_ids, data.feature_ids)
    n, fewer = int((places >= 0).sum()), min(model.n_genes, data.n_genes)
    if n < MIN_SHARED * fewer:
        raise CheckpointError(
            f"{n or 'none'} of the {data.n_genes:,} genes {'are' if n > 1 else 'is'} among the model's "
            f"{model.n_genes:,} (here {', '.join(data.feature_ids[:2])}, there {', '.join(model.feature_ids[:2])}); a "
            f"start needs {MIN_SHARED:.0%} of the smaller set: check the organism and the kind of gene ids"
        )
    return places


def start_flow(
    dit: DiT,
    vocabulary: Vocabulary,
    source: LoadedFlow,
    *,
    parents: Mapping[str, Mapping[str, str]] | None = None,
) -> Started:
    """Give a new DiT the weights of another one, in place.

    The embedding of a label of values is taken over whole if its features mean the same, and that of sets by members.

    Args:
        parents: label -> new class -> class of the other model at whose embedding it starts.

    Raises:
        CheckpointError: The sizes differ, `parents` names a class that is not there, a label has another meaning, or
            the other flow was distilled.
    """
    if problem := whole_flow_problem(source.distilled, "start_from"):
        raise CheckpointError(problem)
    started, state, old = Started(), dit.state_dict(), source.dit.state_dict()
    known = {x.name: x for x in source.vocabulary.labels}
    tables = {f"labels.{label_table_name(x.name)}.weight": x for x in vocabulary.labels if x.values is None}
    check_labels(vocabulary, source.vocabulary, parents)
    started.new += _take_values(state, old, vocabulary, known, started)
    for name, tensor in state.items():
        label = tables.get(name)
        if name in started.new or name in started.old_rows:
            continue
        if label is None and name in old:
            started.parameters += _take(name, tensor, old[name])
            started.old_rows[name] = ALL_ROWS
        elif label is not None and label.name in known:
            own, before = (parents or {}).get(label.name, {}), known[label.name]
            started.parameters += _take_classes(tensor, old[name], label, before, own, started)
            kept = [c in set(before.classes) for c in label.classes]  # a class that starts at a parent is new
            started.old_rows[name] = torch.tensor([*kept, True])  # the null class is old
        elif label is not None:
            tensor.zero_()  # so that the network does at first what it did without this label
            started.new.append(name)
        else:
            started.new.append(name)
    for name in (x for x in old if x not in state):
        if (null := _null_row(name, old[name], source.vocabulary)) is not None:
            state["time.down.bias"].add_(null)  # what it added for every cell without the label
        started.dropped.append(name)
    _require_known(started, allowed=("labels.", FROM_CONTROLS))
    return started


def check_labels(
    vocabulary: Vocabulary, source: Vocabulary, parents: Mapping[str, Mapping[str, str]] | None = None
) -> None:
    """Check that a flow for one vocabulary can take over the labels of a flow of another one.

    Args:
        parents: As of `start_flow`.

    Raises:
        CheckpointError: `parents` names a class that is not there, or a label has another meaning.
    """
    known = {x.name: x for x in source.labels}
    _check_parents(parents or {}, vocabulary, known)
    _check_meanings(vocabulary, known)


def adapt(module: nn.Module, lora: LoraConfig, started: Started, *, seed: int) -> None:
    """Give a network that was started adapters, and train nothing else but what is its own.

    That is what the other network lacks, the values of genes (their embeddings only if some are new), and the classes.
    """
    own = (*PER_GENE, "labels.") if started.genes.get("new") else ("log_theta", "gene_bias", "labels.")
    names = [n for n, _ in module.named_parameters() if n.startswith(own) or n in started.new]
    trained = set(add_adapters(module, lora, seed=seed, also=names))
    n_trained = sum(p.numel() for n, p in module.named_parameters() if n in trained)
    started.adapters = {"rank": lora.rank, "trained": n_trained}


def slow_down(module: nn.Module, factor: float | None, started: Started) -> dict[str, float | Tensor]:
    """Return the learning rates of what was taken over and is trained, relative to what is new, by parameter.

    Call it last, when it is decided what is trained: adapters are new.

    Returns:
        Parameter -> one number, or one for each row; empty without a factor.

    Raises:
        CheckpointError: Nothing that was taken over is trained.
    """
    if factor is None:
        return {}
    found = old_row_factors(module, started.old_rows, factor)
    if not found:
        raise CheckpointError(
            f"start_from.old_learning_rate ({factor:g}) is that of what was taken over, and nothing of it is trained; "
            "leave it out"
        )
    started.old_learning_rate = factor
    return found


def freeze(module: nn.Module, parts: Sequence[str]) -> list[str]:
    """Keep parameters from being trained, and return their names.

    Args:
        parts: Beginnings of names of parameters, whole between dots: `encoder`, `decoder.blocks.0`, `gene_embedding`.

    Raises:
        CheckpointError: A part has no parameter, or nothing would be left to train.
    """
    frozen: list[str] = []
    own = dict(module.named_parameters())
    for part in parts:
        names = [n for n in own if n == part or n.startswith(f"{part}.")]
        if not names:
            raise CheckpointError(f"freeze: the network has no part {part!r} ({choices_hint(part, _parts(own))})")
        frozen += names
    if own and set(frozen) == set(own):
        raise CheckpointError("freeze leaves nothing to train; to use a VAE as it is: model: NAME, train: false")
    for name in frozen:
        own[name].requires_grad_(False)
    return sorted(set(frozen))


def _parts(names: Iterable[str]) -> list[str]:
    """Return all beginnings of names that end at a dot, and the names themselves."""
    found = {".".join(n.split(".")[:k]) for n in names for k in range(1, n.count(".") + 2)}
    return sorted(found, key=lambda n: (n.count("."), n))


# ---- parts -------------------------------------------------------------------------------------------------------
def _positions(old: Sequence[str], new: Sequence[str]) -> Tensor:
    """Return the position in `old` of each name in `new`; -1 for those that it lacks."""
    at = {name: i for i, name in enumerate(old)}
    return torch.tensor([at.get(name, -1) for name in new], dtype=torch.int64)


def _take(name: str, tensor: Tensor, old: Tensor) -> int:
    if tensor.shape != old.shape:
        raise CheckpointError(
            f"{name} is {tuple(tensor.shape)} here and {tuple(old.shape)} in the model: leave the sizes in `model` "
            "out, and they are the model's"
        )
    tensor.copy_(old)
    return old.numel()


@torch.no_grad()
def _take_genes(name: str, tensor: Tensor, old: Tensor, places: Tensor) -> int:
    """Fill what each gene has of its own: (g,) or (g, d)."""
    if tensor.shape[1:] != old.shape[1:]:
        _take(name, tensor, old)  # raises
    kept = places >= 0
    rows = old[places[kept]]
    if name in EMBEDDINGS:
        new = old.mean(0).expand_as(tensor[~kept])
    elif name == "gene_bias":  # the new data's own level, moved to where training has moved the genes that are kept
        new = tensor[~kept] + (rows - tensor[kept]).mean()
    else:
        new = old.median().expand_as(tensor[~kept])
    tensor[kept], tensor[~kept] = rows, new.to(tensor)
    return rows.numel()


@torch.no_grad()
def _take_classes(
    tensor: Tensor,
    old: Tensor,
    label: LabelVocabulary,
    before: LabelVocabulary,
    parents: Mapping[str, str],
    started: Started,
) -> int:
    """Fill the embeddings of a label's classes, (k + 1, d); the last is the null class."""
    if tensor.shape[1:] != old.shape[1:]:
        _take(label.name, tensor, old)  # raises
    places = _positions(before.classes, [parents.get(c, c) for c in label.classes])
    tensor.copy_(torch.cat([old[places], old[-1:]]))  # -1 is the null class
    names = set(before.classes)
    started.classes[label.name] = {
        "kept": sum(c in names for c in label.classes),
        "new": [c for c in label.classes if c not in names],
        "dropped": [c for c in before.classes if c not in set(label.classes)],
        "parents": dict(parents),
    }
    return int((places >= 0).sum() + 1) * old.shape[1]


# ---- labels of values --------------------------------------------------------------------------------------------
def _check_meanings(vocabulary: Vocabulary, known: Mapping[str, LabelVocabulary]) -> None:
    """Refuse labels whose features mean something else than in the model: their weights would be of other numbers."""
    problems = []
    for label in (x for x in vocabulary.labels if x.name in known):
        ours, theirs = label.values, known[label.name].values
        kinds = [WORDS[x.kind] if x is not None else "classes" for x in (ours, theirs)]
        if kinds[0] != kinds[1]:
            problems.append(f"label {label.name} is {kinds[0]} in the data and {kinds[1]} in the model; make both the "
                            f"same (ingest.label_values), or give one another name")  # fmt: skip
        elif isinstance(ours, Sets) and isinstance(theirs, Sets):
            if bool(ours.zero) != bool(theirs.zero):
                problems.append(f"label {label.name}: one of data and model names an untreated control (zero) and the "
                                f"other none; name it in both, or in none")  # fmt: skip
        elif ours is not None and theirs is not None and ours.meaning != theirs.meaning:
            differ = [k for k, v in ours.meaning.items() if theirs.meaning.get(k) != v]
            problems.append(
                f"label {label.name}: {kinds[0]} of the data and of the model differ in {', '.join(differ)}, which "
                f"follow from the training cells: its weights are of other numbers. The data have {ours.summary()}, "
                f"the model has {theirs.summary()}; train on cells with the same values, or start without this label"
            )
    if problems:
        raise CheckpointError("\n".join(problems))


@torch.no_grad()
def _take_values(
    state: Mapping[str, Tensor], old: Mapping[str, Tensor], vocabulary: Vocabulary,
    known: Mapping[str, LabelVocabulary], started: Started,
) -> list[str]:  # fmt: skip
    """Fill the embeddings of labels of values; return the parameters of labels that the model lacks.

    These add nothing at first, so that the network does what it did without them.
    """
    new = []
    for label in (x for x in vocabulary.labels if x.values is not None):
        for name in (n for n in state if n.startswith(f"labels.{label_table_name(label.name)}.")):
            before = known.get(label.name)
            if before is None:
                if not name.endswith((".up.weight", ".up.bias")):
                    state[name].zero_()
                new.append(name)
            elif name.endswith(".members.weight"):
                _take_members(name, state[name], old[name], label, before, started)
            else:
                started.parameters += _take(name, state[name], old[name])
                started.old_rows[name] = ALL_ROWS
    return new


def _take_members(
    name: str, tensor: Tensor, old: Tensor, label: LabelVocabulary, before: LabelVocabulary, started: Started
) -> None:
    """Fill the embeddings of a set's members, (d, f), by name; a new member adds nothing at first."""
    if len(tensor) != len(old):
        _take(name, tensor, old)  # raises
    ours, theirs = _columns(label), _columns(before)
    places = _positions(theirs, ours)
    tensor.zero_()
    tensor[:, places >= 0] = old[:, places[places >= 0]].to(tensor)
    started.parameters += int((places >= 0).sum()) * len(tensor)
    started.old_rows[name] = ALL_ROWS
    started.classes[label.name] = {
        "kept": int((places >= 0).sum()),
        "new": [m for m in ours if m not in theirs],
        "dropped": [m for m in theirs if m not in ours],
        "parents": {},
    }


def _columns(label: LabelVocabulary) -> list[str]:
    """Return the names of a set's features: its members, and what says that it is the control."""
    assert isinstance(label.values, Sets)
    return [*label.values.members, *(["zero"] if label.values.zero else [])]


def _null_row(name: str, tensor: Tensor, vocabulary: Vocabulary) -> Tensor | None:
    """Return the embedding (d,) of the null class, of a label's parameter that holds it; None of any other."""
    for label in vocabulary.labels:
        prefix = f"labels.{label_table_name(label.name)}"
        if name == f"{prefix}.weight" and label.values is None:
            return tensor[-1]
        if name == f"{prefix}.null":
            return tensor
    return None


def _check_parents(
    parents: Mapping[str, Mapping[str, str]], vocabulary: Vocabulary, known: Mapping[str, LabelVocabulary]
) -> None:
    problems = []
    for name, pairs in parents.items():
        if name not in known:
            problems.append(f"parents.{name}: the model has no label {name}; it has {', '.join(known) or 'none'}")
            continue
        if vocabulary.label(name).values is not None:
            problems.append(f"parents.{name}: its classes are values, whose embeddings follow from them; leave it out")
            continue
        for new, parent in pairs.items():
            for what, label, value in (
                ("the data have", vocabulary.label(name), new),
                ("the model has", known[name], parent),
            ):
                if value not in label.classes:
                    problems.append(f"parents.{name}: {what} no class {value!r}")
    if problems:
        raise CheckpointError("\n".join(problems))


def _require_known(started: Started, *, allowed: tuple[str, ...]) -> None:
    """Refuse networks that differ in more than what may differ: weights that are not loaded are never guessed."""
    wrong = [n for n in (*started.new, *started.dropped) if not n.startswith(allowed)]
    if wrong:
        raise CheckpointError(
            f"the networks differ in {', '.join(wrong[:SHOWN])}: leave the settings of `model` out, and they are the "
            "model's"
        )


def _named(names: Sequence[str], what: str) -> str:
    shown = ", ".join(names[:SHOWN]) + (" …" if len(names) > SHOWN else "")
    return f"{len(names)} {what}" + (f" ({shown})" if names else "")
