"""Model folders of a small VAE and flow with random weights, such as upstream could have trained."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn

from scldm.checkpoints.native import new_dit, save_flow, save_vae
from scldm.data.library_size import LibrarySizes, LogNormal, condition_key
from scldm.data.vocabulary import LabelVocabulary, Vocabulary
from scldm.flow.config import ControlStart, Distilled, PathConfig
from scldm.nn.config import DiTConfig, VAEConfig
from scldm.nn.vae import VAE

GENES = ("g0", "g1", "g2", "g3", "g4", "g5")
CELL_TYPES = LabelVocabulary("cell_type", ("T", "B", "NK"))  # not in the order of the alphabet
DONORS = LabelVocabulary("donor", ("d1", "d_2"))


def vocabulary(*labels: LabelVocabulary) -> Vocabulary:
    return Vocabulary(GENES, tuple(gene.upper() for gene in GENES), labels or (CELL_TYPES,))


def library_sizes(*labels: LabelVocabulary) -> LibrarySizes:
    """Class number i of a label has mean 5 + i and deviation 0.5."""
    conditions = [({x.name: c}, 5.0 + i) for x in labels or (CELL_TYPES,) for i, c in enumerate(x.classes)]
    keys = [(condition_key(condition), mean) for condition, mean in conditions]
    return LibrarySizes({"all": LogNormal(9.0, 1.0, 12)} | {key: LogNormal(mean, 0.5, 4, key) for key, mean in keys})


def vae_config(**choices: Any) -> VAEConfig:
    small = {"d_model": 8, "n_layers": 1, "n_heads": 2, "n_heads_cross": 4, "n_latent_tokens": 3, "latent_width": 4}
    return VAEConfig(**small | {"input": "log1p", "gene_bias": False, "genes_seq_len": 6} | choices)


def write_vae(folder: Path, *labels: LabelVocabulary, **choices: Any) -> Path:
    """A VAE's model folder; `choices` of its configuration."""
    vae = random_weights(VAE(vae_config(**choices), n_genes=len(GENES)))
    save_vae(folder, vae, vocabulary(*labels), library_sizes(*labels), card="a small model")
    return folder


def write_flow(
    folder: Path, *labels: LabelVocabulary, path: PathConfig | None = None, start: ControlStart | None = None,
    distilled: Distilled | None = None, **choices: Any,
) -> Path:  # fmt: skip
    """A flow's model folder, its averaged weights others than its raw ones; `choices` of the DiT's configuration."""
    names = vocabulary(*labels)
    config = DiTConfig(**{"d_model": 12, "n_layers": 1, "n_heads": 2} | choices)
    weights = {}
    for seed, which in enumerate(("model", "raw"), start=1):
        dit = new_dit(config, names, latent_shape=(3, 4), from_controls=start is not None)
        dit = random_weights(dit, seed)
        weights[which] = dit.state_dict()
        if config.label_dropout == 0:  # upstream has no null class then
            for name in (k for k in weights[which] if k.startswith("labels.")):
                weights[which][name][-1] = 0
    save_flow(
        folder,
        weights,
        config=config,
        path=path or PathConfig(),
        latent_shape=(3, 4),
        vocabulary=names,
        library_sizes=library_sizes(*labels),
        card="a small model",
        start=start,
        distilled=distilled,
    )
    return folder


def random_weights(module: Any, seed: int = 0) -> Any:
    """The module with every parameter and buffer drawn from the seed."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for tensor in (*module.parameters(), *module.buffers()):
            tensor.copy_(torch.randn(tensor.shape, generator=generator))
    assert isinstance(module, nn.Module)
    return module
