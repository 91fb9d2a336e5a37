"""Find what a converted model needs besides its weights: gene names, label classes, library sizes.

Each is searched in this order: the file that an option names; a file that the configuration names, by its name in the
checkpoint's folder, then in the configuration's, then at the path as written; the vocabulary that Lightning saved
inside the checkpoint. Nothing has a silent default, and it is an error if the checkpoint's own vocabulary disagrees
with a
file: the ids of the embeddings would be other genes or classes.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from scldm.checkpoints.convert.gene_list import GeneList, has_genes, read_classes, read_genes
from scldm.checkpoints.untrusted.reader import read_pickle
from scldm.checkpoints.upstream.settings import UpstreamSettings
from scldm.checkpoints.upstream.sizes import NOT_GIVEN, SizeFactors, library_sizes_from_upstream, named_factors
from scldm.data.library_size import LibrarySizes
from scldm.data.vocabulary import LabelVocabulary, Vocabulary
from scldm.errors import CheckpointError

SAVED = "the checkpoint itself"


@dataclass(frozen=True)
class InputFiles:
    """Files given by the user; None means that the file is searched."""

    genes: Path | None = None
    metadata: Path | None = None
    size_factors_mu: Path | None = None
    size_factors_sd: Path | None = None
    no_size_factors: bool = False


@dataclass(frozen=True)
class Inputs:
    """Vocabulary and library sizes of a converted model, with their sources."""

    vocabulary: Vocabulary
    library_sizes: LibrarySizes
    sources: dict[str, str]  # "genes", "classes", "size factors" -> where they come from
    notes: list[str] = field(default_factory=list)


def gather_inputs(
    given: InputFiles, settings: UpstreamSettings, *, checkpoint: Path, config: Path, about: Mapping[str, Any]
) -> Inputs:
    """Find names and statistics, or raise an error that lists all that is missing and the option for each.

    Args:
        given: Files the user named.
        settings: The configuration; its `files` are only hints.
        checkpoint, config: Files whose folders are searched.
        about: Contents of the checkpoint other than its weights.
    """
    search = _Search(settings.files, (checkpoint.parent, config.parent))
    saved = saved_vocabulary(about)
    sources: dict[str, str] = {}
    missing: list[str] = []
    notes: list[str] = []
    genes = _genes(given, search, saved, sources)
    if genes is None:
        missing.append("gene names, in the order of their ids: --genes FILE (.h5ad, .parquet, .json, .csv, .txt)")
    classes = _classes(given, search, saved, list(settings.class_vocab_sizes), sources)
    if classes is None and settings.kind == "ldm":
        missing.append(
            f"classes of {', '.join(settings.class_vocab_sizes)}: --metadata FILE (.json with labels, or .h5ad)"
        )
    if classes is None:
        notes.append(f"no classes of {', '.join(settings.class_vocab_sizes)} were found; a VAE does not need them")
    factors = _size_factors(given, search, saved, settings, classes or {}, sources, missing)
    if missing:
        where = ", ".join(dict.fromkeys(str(f) for f in search.folders))
        raise CheckpointError(
            f"{checkpoint} needs files that are neither in it nor in its folder ({where}):\n  " + "\n  ".join(missing)
        )
    assert genes is not None
    _check_sizes(genes, classes or {}, settings, sources)
    sizes = LibrarySizes({}, NOT_GIVEN)
    if factors is not None:
        sizes, more = library_sizes_from_upstream(factors, classes or {})
        notes += more
    sources.setdefault("size factors", "none: library_size.json says so, and drawing a library size is an error")
    labels = tuple(_label(name, own) for name, own in (classes or {}).items())
    return Inputs(Vocabulary(genes.feature_ids, genes.feature_names, labels), sizes, sources, notes)


def saved_vocabulary(about: Mapping[str, Any]) -> dict[str, Any]:
    """Return the vocabulary encoder that Lightning saved among the hyper-parameters, as data; empty if absent."""
    parameters = about.get("datamodule_hyper_parameters")
    found = parameters.get("vocabulary_encoder") if isinstance(parameters, dict) else None
    return found if isinstance(found, dict) else {}


@dataclass(frozen=True)
class _Search:
    files: Mapping[str, str | None]
    folders: tuple[Path, ...]

    def find(self, name: str, endings: Iterable[str]) -> Path | None:
        """Return the file that the configuration calls `name`, if it exists and has a readable ending."""
        named = self.files.get(name)
        if not named or not named.endswith(tuple(endings)):
            return None
        places = [*(folder / Path(named).name for folder in self.folders), Path(named)]
        return next((place for place in places if place.is_file()), None)


def _genes(given: InputFiles, search: _Search, saved: Mapping[str, Any], sources: dict[str, str]) -> GeneList | None:
    own = saved.get("genes")
    inside = GeneList.from_ids(own) if isinstance(own, list) and own else None
    path = given.genes or search.find("metadata_genes", [".parquet"])
    path = path or (given.metadata if given.metadata is not None and has_genes(given.metadata) else None)
    path = path or search.find("metadata_json", [".json"]) or search.find("adata_path", [".h5ad"])
    if path is None:
        if inside is not None:
            sources["genes"] = SAVED
        return inside
    genes = read_genes(path)
    sources["genes"] = str(path)
    if inside is not None:
        _agree(genes.feature_ids, inside.feature_ids, "genes", path)
    return genes


def _classes(
    given: InputFiles, search: _Search, saved: Mapping[str, Any], labels: Sequence[str], sources: dict[str, str]
) -> dict[str, list[str]] | None:
    """Return the classes per label, or None if they are not found."""
    if not labels:
        return {}
    own = saved.get("labels")
    inside = {k: list(map(str, v)) for k, v in own.items()} if isinstance(own, dict) else {}
    path = given.metadata or search.find("metadata_json", [".json"]) or search.find("adata_path", [".h5ad"])
    if path is None:
        if not all(label in inside for label in labels):
            return None
        sources["classes"] = SAVED
        return {label: inside[label] for label in labels}
    classes = read_classes(path, labels)
    sources["classes"] = str(path)
    for label in labels:
        if label in inside:
            _agree(classes[label], inside[label], f"classes of {label}", path)
    return classes


def _size_factors(
    given: InputFiles,
    search: _Search,
    saved: Mapping[str, Any],
    settings: UpstreamSettings,
    classes: Mapping[str, Sequence[str]],
    sources: dict[str, str],
    missing: list[str],
) -> SizeFactors | None:
    if given.no_size_factors:
        return None
    mu = given.size_factors_mu or search.find("mu_size_factor", [".pkl", ".pickle"])
    sd = given.size_factors_sd or search.find("sd_size_factor", [".pkl", ".pickle"])
    if mu is not None and sd is not None:
        sources["size factors"] = f"{mu}, {sd}"
        return SizeFactors(_table(read_pickle(mu), mu), _table(read_pickle(sd), sd))
    if (given.size_factors_mu is None) != (given.size_factors_sd is None):
        missing.append("the other file of size factors: --size-factors-mu and --size-factors-sd go together")
        return None
    tables = (saved.get("mu_size_factor"), saved.get("sd_size_factor"))
    if all(isinstance(t, dict) for t in tables) and classes:
        by_id = saved.get("condition_strategy") != "joint"
        sources["size factors"] = SAVED
        return SizeFactors(*(named_factors(_table(t, SAVED), classes, by_id=by_id) for t in tables))
    if settings.kind == "ldm" and settings.vae.head != "gaussian":  # which draws no counts
        missing.append(
            "size factors (library sizes of generated cells): --size-factors-mu FILE --size-factors-sd FILE, or"
            " --no-size-factors for a model that draws none"
        )
    return None


def _table(value: Any, where: Path | str) -> dict[str, dict[str, Any]]:
    if not isinstance(value, dict) or not all(isinstance(v, dict) for v in value.values()):
        raise CheckpointError(f"{where}: size factors must be a dictionary of dictionaries, label -> class -> value")
    return value


def _agree(ours: Sequence[str], saved: Sequence[str], what: str, path: Path) -> None:
    """Raise if a file disagrees with the vocabulary that the checkpoint was trained with."""
    if len(ours) != len(saved):
        raise CheckpointError(f"{path} has {len(ours)} {what}, the vocabulary saved in the checkpoint {len(saved)}")
    for i, (a, b) in enumerate(zip(ours, saved, strict=True)):
        if a != b:
            raise CheckpointError(
                f"{path}: {what}, number {i}, is {a!r}; the vocabulary saved in the checkpoint has {b!r}"
            )


def _check_sizes(
    genes: GeneList, classes: Mapping[str, Sequence[str]], settings: UpstreamSettings, sources: Mapping[str, str]
) -> None:
    if len(genes.feature_ids) != settings.n_genes:
        raise CheckpointError(
            f"{sources['genes']} has {len(genes.feature_ids)} genes, the configuration n_genes {settings.n_genes}"
        )
    for label, own in classes.items():
        if len(own) != settings.class_vocab_sizes[label]:
            raise CheckpointError(
                f"{sources['classes']} has {len(own)} classes of {label}, the configuration"
                f" class_vocab_sizes.{label} {settings.class_vocab_sizes[label]}"
            )


def _label(name: str, classes: Sequence[str]) -> LabelVocabulary:
    try:
        return LabelVocabulary(name, tuple(classes))
    except ValueError as error:
        raise CheckpointError(str(error)) from None
