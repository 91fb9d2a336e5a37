"""The model card of a published folder: README.md with the YAML header that Hugging Face reads.

The card holds what is recorded about the models: their data, genes, labels, settings, what they were started from, and
scores with their floors. What is not recorded is said to be unknown. Licence, intended use and consent of donors are
never recorded; the publisher adds them.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Protocol

from scldm.api.folders import ModelFolders
from scldm.api.origin import RecordedScores, card_facts, recorded_scores
from scldm.checkpoints.native import LoadedFlow, LoadedVAE
from scldm.data.vocabulary import Vocabulary
from scldm.metrics.score import KEY_PREFIXES, KEY_SCORES
from scldm.nn.config import VAEConfig
from scldm.text import plain_line

UNKNOWN_LICENCE = "unknown"  # an identifier of Hugging Face's; the publisher states another one
MOST_CLASSES = 30  # of a label that are listed
TRAINING_FACTS = ("data", "organism", "split", "weights", "licence of the data")  # that every reader looks for


class DescribedModel(Protocol):
    """What a card describes; `scldm.Model` is one."""

    vae: LoadedVAE
    flow: LoadedFlow | None
    folders: ModelFolders

    @property
    def vocabulary(self) -> Vocabulary: ...
    @property
    def labels(self) -> dict[str, tuple[str, ...]]: ...
    @property
    def latent_shape(self) -> tuple[int, int]: ...


def model_card(model: DescribedModel, name: str) -> str:
    """Return the card as Markdown.

    Args:
        name: Title, the name of the folder.
    """
    sections = [
        *_head(has_flow=model.flow is not None), f"# {plain_line(name)}", "", *_what(model), *_use(model, name),
        *_genes_and_labels(model), *_training(model), *_scores(model), *_licence(), *_limits(model),
    ]  # fmt: skip
    return "\n".join(sections) + "\n"


def _head(*, has_flow: bool) -> list[str]:
    tags = ["single-cell", "rna-seq", *(["generative", "flow-matching"] if has_flow else [])]
    return [
        "---",
        "library_name: scldm",
        f"license: {UNKNOWN_LICENCE}",
        "tags:",
        *(f"- {tag}" for tag in tags),
        "---",
        "",
    ]


def _what(model: DescribedModel) -> list[str]:
    vae, flow = model.vae.vae, model.flow
    m, e = model.latent_shape
    return [
        "A transformer VAE that turns the counts of a cell into a few latent tokens and back"
        + (", and a flow-matching transformer that makes such latents from noise." if flow else "."),
        "Architecture: Palla et al., arXiv 2511.02986; this implementation is independent of its authors' code.",
        "",
        "| | VAE | flow |",
        "|---|---|---|",
        f"| parameters | {_parameters(vae)} | {_parameters(flow.dit) if flow else 'none'} |",
        f"| width, layers | {_sizes(vae.config)} | "
        + (f"{flow.dit.config.d_model}, {flow.dit.config.n_layers} |" if flow else "– |"),
        f"| | {model.vocabulary.n_genes:,} genes, head {vae.config.head}, input {vae.config.input} | "
        + (f"path {flow.path.path}, labels {flow.dit.strategy} |" if flow else "– |"),
        "",
        f"Latents: {m} tokens x {e}.",
        "",
    ]


def _sizes(config: VAEConfig) -> str:
    decoder = config.for_decoder()
    width = str(config.d_model) if decoder.d_model == config.d_model else f"{config.d_model} + {decoder.d_model}"
    return f"{width}, {config.n_layers} + {decoder.n_layers}"


def _use(model: DescribedModel, name: str) -> list[str]:
    folder = plain_line(name)
    lines = [
        "## Use",
        "",
        "```python",
        "import scldm",
        "",
        f'model = scldm.Model.from_pretrained("{folder}")',
        'model.encode(adata)  # raw counts in; obsm["X_scldm"]',
    ]
    if model.flow is not None:
        lines.append("cells = model.generate(n=100, seed=0)  # conditions: {label: class}")
    lines += ["```", ""]
    if model.vae.vae.config.head == "gaussian":
        lines += ["The head is Gaussian: cells that it makes hold log1p of counts per 10,000, and no counts.", ""]
    return lines


# ---- data --------------------------------------------------------------------------------------------------------
def _genes_and_labels(model: DescribedModel) -> list[str]:
    ids = model.vocabulary.feature_ids
    shown = ", ".join(plain_line(gene) for gene in ids[:3])
    lines = ["## Genes and labels", "", f"{len(ids):,} genes by id ({shown}, …): `vae/vocabulary.json`.", ""]
    if not model.labels:
        lines.append("* labels: none")
    for label, classes in model.labels.items():
        if (values := model.vocabulary.values.get(label)) is not None:
            lines.append(f"* label `{plain_line(label)}`: {plain_line(values.summary())}")
            continue
        listed = ", ".join(plain_line(c) for c in classes[:MOST_CLASSES])
        more = f", … ({len(classes):,} in all)" if len(classes) > MOST_CLASSES else ""
        lines.append(f"* label `{plain_line(label)}`: {listed}{more}")
    sizes = model.vae.library_sizes
    none = f"none ({plain_line(sizes.missing)}); pass `library_size`"
    known = f"log-normal, {len(sizes.table):,} conditions"
    lines.append(f"* library sizes: {known if sizes.missing is None else none}")
    return [*lines, ""]


def _training(model: DescribedModel) -> list[str]:
    """Return what the cards of VAE and flow state about their training, and what they do not state."""
    lines = ["## Training", ""]
    for part, folder in (("VAE", model.folders.vae), ("flow", model.folders.flow)):
        if folder is not None:
            lines += [f"{part}:", "", *_facts_of(folder), ""]
    return lines


def _facts_of(folder: Path) -> Iterator[str]:
    facts = card_facts(folder)
    yield from (f"* {fact}" for fact in facts)
    if unknown := [name for name in TRAINING_FACTS if not any(f.startswith(f"{name}:") for f in facts)]:
        yield f"* unknown, because nothing recorded it: {', '.join(unknown)}"


# ---- scores ------------------------------------------------------------------------------------------------------
def _scores(model: DescribedModel) -> list[str]:
    lines = ["## Scores", ""]
    if model.flow is None:
        return [*lines, "None: a VAE alone makes no cells to compare.", ""]
    found = recorded_scores(model.folders)
    if found is None:
        return [*lines, "Unknown: there is no evaluation of cells of this flow beside the model.", ""]
    return [*lines, *_table(found), ""]


def _table(found: RecordedScores) -> Iterator[str]:
    yield (
        f"Generated cells against held-out real ones (split {plain_line(found.split)}, protocol "
        f"{plain_line(found.protocol)}, evaluation {plain_line(found.version)}). The floor is the same score of real "
        "cells against other real cells: a good model is near it."
    )
    yield from ("", "| score | generated | floor |", "|---|---|---|")
    names = [k for k in KEY_SCORES if k in found.scores]
    names += [k for k in found.scores if k.startswith(KEY_PREFIXES)]
    for name in names:
        floor = f"{found.floor[name]:.4g}" if name in found.floor else "unknown"
        yield f"| {plain_line(name).replace('|', '/')} | {found.scores[name]:.4g} | {floor} |"
    if found.verdict:
        yield from ("", plain_line(found.verdict))


# ---- the publisher's ---------------------------------------------------------------------------------------------
def _licence() -> list[str]:
    return [
        "## Licence",
        "",
        "Unknown: no model records one. Whoever publishes this folder states it here and in the head of this file "
        "(`license:`), with the intended use and the consent behind the training data. The code of `scldm` is under "
        "the MIT licence.",
        "",
    ]


def _limits(model: DescribedModel) -> list[str]:
    lines = ["## Limits", ""]
    if model.flow is not None:
        lines += [
            "* Generated cells are synthetic: mark them so wherever they are mixed with measured ones.",
            "* A combination of labels that no training cell had is composed, not learned.",
        ]
    lines.append("* It knows its own genes only; data are aligned to them by id, and genes that are absent count as "
                 "zeros.")  # fmt: skip
    return lines


def _parameters(module: object) -> str:
    n = sum(p.numel() for p in module.parameters())  # type: ignore[attr-defined]
    return f"{n:,}"
