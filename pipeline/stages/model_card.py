"""Writes the model card of an exported model."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import yaml

from pipeline.core.manifest import Manifest
from scldm.api.model_card import plain_line
from scldm.config import StrictModel

_SUMMARY = {
    "vae": "scLDM transformer VAE: a cell's gene counts to latent tokens and back.",
    "flow": "scLDM flow-matching DiT on the latents of a VAE; `model.safetensors` holds the averaged weights.",
}


def model_card(kind: str, config: StrictModel, inputs: Mapping[str, Manifest]) -> str:
    """Return the card as Markdown: the model, its training data and its settings."""
    ingest = inputs["ingest"].facts
    labels = ", ".join(map(plain_line, ingest["labels"])) or "none"
    lines = [
        f"# {_SUMMARY[kind]}",
        "",
        "Architecture: Palla et al., arXiv 2511.02986. Genes and classes by name: `vocabulary.json`.",
        "",
        f"* data: {plain_line(ingest.get('source', 'not stated'))} (digest {str(ingest.get('digest', ''))[:12]})",
        *_old_cells(ingest),
        *_likelihood(config),
        f"* cells: {ingest['n_cells']}; genes: {ingest['n_genes']}; labels: {labels}",
        *(f"* input {name}: {m.version}" for name, m in inputs.items()),
        "",
        "Generated cells are synthetic: mark them so wherever they are mixed with measured ones.",
        "",
        "```yaml",
        yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False).rstrip().replace("```", "'''"),
        "```",
        "",
    ]
    return "\n".join(lines)


def _likelihood(config: StrictModel) -> list[str]:
    """Return what a VAE draws, by its head; nothing for a flow."""
    head = getattr(getattr(config, "model", None), "head", None)
    drawn = "log1p of counts per 10,000, Normal(mu, 1): no counts" if head == "gaussian" else "negative-binomial counts"
    return [] if head is None else [f"* draws: {drawn}"]


def _old_cells(ingest: Mapping[str, Any]) -> list[str]:
    """Return the line about old cells among the training cells, if there are any."""
    if (replay := ingest.get("replay")) is None:
        return []
    return [f"* of the training cells, {replay['n_cells']} are old ones: {plain_line(replay['source'])}"]
