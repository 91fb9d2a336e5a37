"""Trains the VAE: sparse cells from SOMA, through Ray Data, into DeepSpeed workers. Or takes one that is trained."""

from __future__ import annotations

import logging
from typing import Any

from pipeline.config.context import StageContext
from pipeline.config.job import TrainVaeConfig
from pipeline.data.ingest.dataset import IngestedDataset
from pipeline.stages.training.model_card import model_card
from pipeline.stages.training.spec import log_start, vae_spec
from pipeline.training.trainer import fit
from scldm.api.folders import find_model
from scldm.data.vocabulary import Vocabulary
from scldm.errors import InputError

log = logging.getLogger(__name__)


def run(config: TrainVaeConfig, context: StageContext) -> dict[str, Any]:
    """Train, or take a trained one, and return the facts.

    Facts: model (folder), latent_shape, steps, n_parameters, metrics; of a training also checkpoint, and n_trained if
    not all parameters are trained.
    """
    if config.pretrained is not None:
        return use_pretrained(config, context)
    facts = fit(vae_spec(config, context), config.train, context.resources, "train_vae")
    log_start("train_vae", facts)
    return facts


def use_pretrained(config: TrainVaeConfig, context: StageContext) -> dict[str, Any]:
    """Write the model folder of this stage with the weights of another one, unchanged.

    Labels and library sizes are those of the data: the flow is trained on them.

    Returns:
        Facts: as of a training of no steps; pretrained (name and digest of the model).

    Raises:
        InputError: The data have other genes than the model.
    """
    from scldm.checkpoints.native import folder_digest, load_vae, save_vae

    assert config.pretrained is not None
    folder = find_model(config.pretrained, "vae")
    data = IngestedDataset.open(context.inputs["ingest"])
    _require_its_genes(config.pretrained, Vocabulary.load(folder / "vocabulary.json"), data.vocabulary)
    loaded = load_vae(folder)
    digest = folder_digest(folder)
    card = model_card("vae", config, context.inputs, given=(config.pretrained, folder))
    save_vae(context.folder / "model", loaded.vae, data.vocabulary, data.library_sizes, card=card)
    log.info("the VAE %s is used as it is (digest %s)", config.pretrained, digest[:12])
    return {
        "model": "model",
        "latent_shape": [loaded.vae.config.n_latent_tokens, loaded.vae.config.latent_width],
        "steps": 0,
        "n_parameters": sum(p.numel() for p in loaded.vae.parameters()),
        "metrics": {},
        "pretrained": {"name": config.pretrained, "digest": digest},
    }


def _require_its_genes(name: str, model: Vocabulary, data: Vocabulary) -> None:
    if model.feature_ids == data.feature_ids:
        return
    common = len(set(model.feature_ids) & set(data.feature_ids))
    raise InputError(
        f"the data were ingested with {data.n_genes} genes, of which {common} are among the {model.n_genes} of {name}, "
        f"or in another order; ingest them with the genes of the model: ingest.genes.vocabulary={name}"
    )
