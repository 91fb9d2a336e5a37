"""Writes the model card of a model that a stage trained or took over: one fact a line, `* name: value`.

`scldm.api.hub.model_card` copies these lines into the card of a published folder.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml

from pipeline.config.job import DistilConfig
from pipeline.core.manifest import Manifest
from pipeline.data.validation.gene_names import organism_of
from scldm.api.origin import inherited_facts
from scldm.config import StrictModel
from scldm.data.vocabulary import Vocabulary
from scldm.flow.config import shown_guidance
from scldm.text import plain_line

_SUMMARY = {
    "vae": "scLDM transformer VAE: a cell's gene counts to latent tokens and back.",
    "flow": "scLDM flow-matching DiT on the latents of a VAE; `model.safetensors` holds the averaged weights.",
    "distil": "scLDM DiT that was distilled from a flow; `model.safetensors` holds the averaged weights.",
}
_NOT_RECORDED = "unknown (not recorded)"


def model_card(
    kind: str, config: StrictModel, inputs: Mapping[str, Manifest], *, given: tuple[str, Path] | None = None
) -> str:
    """Return the card as Markdown: the model, its training data and its settings.

    Args:
        given: Name and folder of the model whose weights were taken as they are, or trained on from.
    """
    return _card(kind, _facts(config, inputs, given), config)


def distilled_card(config: DistilConfig, teacher: Path, inputs: Mapping[str, Manifest]) -> str:
    """Return the card of a distilled flow: how it generates, and what the flow that it was made from says of itself.

    Args:
        teacher: Model folder of that flow.
    """
    name = plain_line(config.model) if config.model is not None else f"train_flow {inputs['train_flow'].version}"
    n = config.evaluations
    facts = [
        f"distilled: a cell takes {n} evaluation{'s' if n > 1 else ''} of the network, with guidance "
        f"{shown_guidance(config.guidance)}; from {name}, on {config.trajectories} of its trajectories, without cells",
        "weights: trained on trajectories of the flow that it was distilled from, from that flow's weights",
        *inherited_facts("teacher", teacher),
        *(f"input {stage}: {manifest.version}" for stage, manifest in inputs.items()),
    ]
    return _card("distil", facts, config)


def _card(kind: str, facts: Iterable[str], config: StrictModel) -> str:
    lines = [
        f"# {_SUMMARY[kind]}",
        "",
        "Architecture: Palla et al., arXiv 2511.02986. Genes and classes by name: `vocabulary.json`.",
        "",
        *(f"* {fact}" for fact in facts),
        "",
        "Generated cells are synthetic: mark them so wherever they are mixed with measured ones.",
        "",
        "```yaml",
        yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False).rstrip().replace("```", "'''"),
        "```",
        "",
    ]
    return "\n".join(lines)


def _facts(config: StrictModel, inputs: Mapping[str, Manifest], given: tuple[str, Path] | None) -> Iterator[str]:
    ingest = inputs["ingest"]
    facts, settings = ingest.facts, ingest.config
    labels = ", ".join(map(plain_line, facts["labels"])) or "none"
    yield f"data: {plain_line(_source(ingest))} (digest {str(facts.get('digest', ''))[:12]})"
    yield from _old_cells(facts)
    yield from _likelihood(config)
    yield from _start(config)
    yield f"cells: {facts['n_cells']}; genes: {facts['n_genes']}; labels: {labels}"
    for label, about in facts.get("label_values", {}).items():
        yield f"label {plain_line(label)}: {plain_line(about['summary'])}"
    yield f"organism: {_organism(ingest)}"
    yield f"split: {_split(settings.get('split'))}"
    yield f"licence of the data: {_NOT_RECORDED}"
    yield from _weights(config, given)
    for name, manifest in inputs.items():
        yield f"input {name}: {manifest.version}"


def _likelihood(config: StrictModel) -> Iterator[str]:
    """Yield what a VAE draws, by its head; nothing for a flow."""
    if (head := getattr(getattr(config, "model", None), "head", None)) is not None:
        normal = "log1p of counts per 10,000, Normal(mu, 1): no counts"
        yield f"draws: {normal if head == 'gaussian' else 'negative-binomial counts'}"


def _start(config: StrictModel) -> Iterator[str]:
    """Yield what a flow starts at, if that is not noise alone."""
    if (start := getattr(config, "controls", None)) is not None:
        noise = "" if start.share == 1 else "noise, and at "
        yield (
            f"starts at: {noise}control cells ({plain_line(start.label)} {plain_line(start.control)}) with the same "
            f"other labels, {start.share:g} of the training cells"
        )


def _old_cells(facts: Mapping[str, Any]) -> Iterator[str]:
    """Yield the line about old cells among the training cells, if there are any; without folders, as `_source`."""
    if (replay := facts.get("replay")) is not None:
        text = re.sub(r"(?<![\w./:])(?:~?/)(?:[^/\s(),]+/)+", "", str(replay["source"]))
        yield f"of the training cells, {replay['n_cells']} are old ones: {plain_line(text)}"


def _source(ingest: Manifest) -> str:
    """Return the description of the source, with file names only: a path would reveal folders of this machine."""
    text, paths = str(ingest.facts.get("source", _NOT_RECORDED)), ingest.config.get("source", {}).get("path", [])
    for path in [paths] if isinstance(paths, str) else paths:
        text = text.replace(str(path), Path(path).name)
    return text


def _organism(ingest: Manifest) -> str:
    """Return what the source says, else what the gene ids tell."""
    if named := ingest.config.get("source", {}).get("organism"):
        return plain_line(named)
    if "vocabulary" in ingest.facts and (found := organism_of(Vocabulary.load(ingest.path("vocabulary")).feature_ids)):
        return f"{found}, by the Ensembl ids of the genes"
    return _NOT_RECORDED


def _split(split: Any) -> str:
    if not isinstance(split, Mapping):
        return _NOT_RECORDED
    text = ", ".join(f"{side} {split.get(side)}" for side in ("validation", "test"))
    held_out = "" if split.get("held_out") is None else "; combinations of labels are held out"
    return f"{text}, by {plain_line(split.get('by'))}{held_out}"


def _weights(config: StrictModel, given: tuple[str, Path] | None) -> Iterator[str]:
    """Yield where the weights come from; of a model that was trained before, what its own card states."""
    if given is None:
        yield "weights: trained from random ones on these data"
        return
    from scldm.checkpoints.native import folder_digest

    name, folder = given
    if Path(name).is_absolute():
        name = "/".join(Path(name).parts[-2:])
    as_it_is = getattr(config, "pretrained", None) is not None
    done = (
        "those of {}, unchanged: not trained on these data" if as_it_is else "trained on these data, from those of {}"
    )
    yield f"weights: {done.format(plain_line(name))} (digest {folder_digest(folder)[:12]})"
    yield from inherited_facts(name, folder)
