"""The model card of a published folder: README.md with the YAML header that Hugging Face reads.

The card holds what is known from the models themselves. Licence, intended use and consent of donors are marked as not
stated; the publisher adds them.
"""

from __future__ import annotations

from pathlib import Path
from typing import Protocol

from scldm.api.folders import ModelFolders
from scldm.checkpoints.native import LoadedFlow, LoadedVAE
from scldm.data.vocabulary import Vocabulary
from scldm.nn.config import VAEConfig

MOST_CLASSES = 30  # of a label that are listed


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
    return (
        "\n".join([*_head(), f"# {plain_line(name)}", "", *_what(model), *_use(name), *_data(model), *_limits(model)])
        + "\n"
    )


def _head() -> list[str]:
    return [
        "---",
        "library_name: scldm",
        "tags:",
        "- single-cell",
        "- rna-seq",
        "- generative",
        "- flow-matching",
        "---",
        "",
    ]


def _what(model: DescribedModel) -> list[str]:
    vae, flow = model.vae.vae, model.flow
    m, e = model.latent_shape
    lines = [
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
        f"Latents: {m} tokens x {e}. Genes by id and name: `vae/vocabulary.json`.",
        "",
    ]
    for label, classes in model.labels.items():
        shown = ", ".join(plain_line(c) for c in classes[:MOST_CLASSES])
        more = f", … ({len(classes):,} in all)" if len(classes) > MOST_CLASSES else ""
        lines.append(f"* label `{plain_line(label)}`: {shown}{more}")
    return [*lines, ""] if model.labels else lines


def _sizes(config: VAEConfig) -> str:
    decoder = config.for_decoder()
    width = str(config.d_model) if decoder.d_model == config.d_model else f"{config.d_model} + {decoder.d_model}"
    return f"{width}, {config.n_layers} + {decoder.n_layers}"


def _use(name: str) -> list[str]:
    folder = plain_line(name)
    return [
        "## Use",
        "",
        "```python",
        "import scldm",
        "",
        f'model = scldm.Model.from_pretrained("{folder}")',
        'model.encode(adata)  # raw counts in; obsm["X_scldm"]',
        "cells = model.generate(n=100, seed=0)  # conditions: {label: class}",
        "```",
        "",
    ]


def _data(model: DescribedModel) -> list[str]:
    """Return what the cards of VAE and flow state about their training."""
    lines = ["## Training", ""]
    for part, folder in (("VAE", model.folders.vae), ("flow", model.folders.flow)):
        if folder is not None:
            said = _bullets(folder / "README.md")
            lines += [f"{part}:", "", *(said or ["* not stated by the card of this part"]), ""]
    sizes = model.vae.library_sizes
    lines.append(
        f"Library sizes: none ({sizes.missing}); pass `library_size`." if sizes.missing is not None
        else f"Library sizes: log-normal, {len(sizes.table):,} conditions."
    )  # fmt: skip
    return [*lines, ""]


def _limits(model: DescribedModel) -> list[str]:
    return [
        "## Limits",
        "",
        "* Generated cells are synthetic: mark them so wherever they are mixed with measured ones.",
        "* A combination of labels that no training cell had is composed, not learned.",
        "* It knows its own genes only; data are aligned to them by id, and genes that are absent count as zeros.",
        "* Licence, intended use and the consent behind the training data are not stated by the models: whoever "
        "publishes this folder adds them here.",
    ]


def _bullets(card: Path) -> list[str]:
    if not card.is_file():
        return []
    return [plain_line(line) for line in card.read_text(errors="replace").splitlines() if line.startswith("* ")]


def _parameters(module: object) -> str:
    n = sum(p.numel() for p in module.parameters())  # type: ignore[attr-defined]
    return f"{n:,}"


def plain_line(text: object) -> str:
    """Return one line without markup, which an untrusted name could contain."""
    plain = "".join(c if c.isprintable() else " " for c in str(text))
    return plain.replace("<", "&lt;").replace("`", "'")
