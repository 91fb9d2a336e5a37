"""Export our model folders as a checkpoint that upstream loads: the inverse of `convert`.

    OUT/model.ckpt                   state_dict under upstream's names
    OUT/config.yaml                  the configuration to build the module, with hydra
    OUT/metadata.json                genes and classes in the order of their ids
    OUT/genes.parquet                if genes have names besides their ids
    OUT/log_size_factor_{mu,sd}.pkl  if the model has library-size statistics

Settings that upstream cannot represent are refused by name.
"""

from __future__ import annotations

import json
import pickle
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from pydantic import ValidationError
from torch import Tensor

from scldm.checkpoints.native import LoadedFlow, LoadedVAE, load_flow, load_vae
from scldm.checkpoints.output_folder import atomic_folder, check_output
from scldm.checkpoints.upstream.config import DECODER, vae_config_from_upstream
from scldm.checkpoints.upstream.names_dit import dit_state_to_upstream
from scldm.checkpoints.upstream.names_vae import vae_state_to_upstream
from scldm.checkpoints.upstream.settings import read_settings
from scldm.checkpoints.upstream.sizes import size_factors_to_upstream
from scldm.checkpoints.upstream.template import VAE_FIELDS, write_upstream_config
from scldm.errors import CheckpointError
from scldm.nn.config import VAEConfig

CHECKPOINT, CONFIG, METADATA, GENES = "model.ckpt", "config.yaml", "metadata.json", "genes.parquet"
SIZE_FACTORS = {"mu": "log_size_factor_mu.pkl", "sd": "log_size_factor_sd.pkl"}
LIGHTNING = "2.5.0"  # version that Lightning requires in a checkpoint that it loads


@dataclass(frozen=True)
class ExportResult:
    """Folder of an exported model, with notes for the user."""

    folder: Path
    files: tuple[str, ...]
    notes: tuple[str, ...]


def export_upstream(vae: Path, flow: Path | None, out: Path, *, force: bool = False) -> ExportResult:
    """Write a model as upstream's checkpoint.

    Args:
        vae: Model folder of the VAE.
        flow: Model folder of the flow on its latents; None for the VAE alone.
        out: Folder to write.
        force: Replace an earlier export in `out`.

    Raises:
        CheckpointError: Upstream cannot represent the model, or the folders do not belong together.
    """
    check_output(out, force=force, is_earlier=lambda folder: (folder / CHECKPOINT).is_file())
    of_vae = load_vae(vae)
    averaged = None if flow is None else load_flow(flow)
    raw = None if flow is None else load_flow(flow, weights="raw")
    values = upstream_vae_values(of_vae.vae.config)
    if averaged is not None:
        _check_pair(of_vae, averaged)
        if averaged.start is not None:
            raise CheckpointError(
                f"upstream cannot represent the flow {flow}: it was trained from control cells "
                f"({averaged.start.label} {averaged.start.control}) too, and upstream's flows start at noise only"
            )
        if averaged.distilled is not None:
            raise CheckpointError(
                f"upstream cannot represent the flow {flow}: it was distilled to {averaged.distilled.evaluations} "
                "evaluations, and upstream would integrate it as a velocity; export the flow that it was distilled from"
            )
        if kinds := [f"{label} is {x.summary()}" for label, x in averaged.vocabulary.values.items()]:
            raise CheckpointError(
                "upstream cannot represent this flow: it has tables of classes only, and "
                f"{'; '.join(kinds)}. The VAE alone can be exported"
            )
    with atomic_folder(out) as folder:
        notes = _write(folder, of_vae, averaged, raw, values)
        _check_reads_back(folder, of_vae, averaged)
        files = tuple(sorted(p.name for p in folder.iterdir()))
    return ExportResult(out, files, tuple(notes))


def upstream_vae_values(config: VAEConfig) -> dict[str, Any]:
    """Return a VAE's settings under upstream's names.

    Raises:
        CheckpointError: Upstream does not have some settings; the message says what they would have to be.
    """
    problems = []
    if config.input == "count_aware":
        problems.append("input is count_aware; upstream has only the other inputs")
    if config.gene_bias:
        problems.append("gene_bias is true; upstream has no bias per gene")
    if config.genes_seq_len is None:
        problems.append("genes_seq_len is null (pads are masked); upstream's encoder sees its pads")
    values = {theirs: getattr(config, ours) for ours, theirs in VAE_FIELDS.items() if hasattr(config, ours)}
    own = {} if config.decoder is None else config.decoder.model_dump(exclude_none=True)
    values |= {theirs: own[ours] for theirs, ours in DECODER.items() if ours in own}
    values["head"] = {"nb_cell": "nb_unshared"}.get(config.head, config.head)
    if not problems:
        problems = _differences(config, values)
    if problems:
        raise CheckpointError("upstream cannot represent this VAE:\n  " + "\n  ".join(problems))
    return values


def _differences(config: VAEConfig, values: Mapping[str, Any]) -> list[str]:
    """Return the settings that change on the way to upstream and back."""
    try:
        back = vae_config_from_upstream(values, genes_seq_len=config.genes_seq_len)
    except (ValidationError, ValueError, KeyError) as error:
        return [str(error)]
    pairs = ((name, getattr(config, name), getattr(back, name)) for name in VAEConfig.model_fields)
    return [f"{name} is {ours!r}; in upstream it would be {theirs!r}" for name, ours, theirs in pairs if ours != theirs]


def _check_pair(vae: LoadedVAE, flow: LoadedFlow) -> None:
    config = vae.vae.config
    if (flow.n_latent_tokens, flow.latent_width) != (config.n_latent_tokens, config.latent_width):
        raise CheckpointError(
            f"the flow takes latents ({flow.n_latent_tokens}, {flow.latent_width}), the VAE has"
            f" ({config.n_latent_tokens}, {config.latent_width}): not a pair"
        )
    if vae.vocabulary.feature_ids != flow.vocabulary.feature_ids:
        raise CheckpointError("the VAE and the flow have different genes, or another order: not a pair")


def _write(
    folder: Path, vae: LoadedVAE, flow: LoadedFlow | None, raw: LoadedFlow | None, values: dict[str, Any]
) -> list[str]:
    """Write all files; return notes for the user."""
    source = vae if flow is None else flow
    vocabulary = source.vocabulary
    classes = {label.name: label.classes for label in vocabulary.labels}
    notes, named = [], {"metadata_json": METADATA}
    metadata = {"genes": list(vocabulary.feature_ids), "labels": {k: list(v) for k, v in classes.items()}}
    (folder / METADATA).write_text(json.dumps(metadata, indent=1))
    if vocabulary.feature_names != vocabulary.feature_ids:
        table = pd.DataFrame({"feature_id": vocabulary.feature_ids, "feature_name": vocabulary.feature_names})
        table.to_parquet(folder / GENES)
        named["metadata_genes"] = GENES
    joint = flow is not None and flow.dit.strategy == "joint"
    factors = size_factors_to_upstream(source.library_sizes, classes)
    if factors.mu:
        for which, content in (("mu", factors.mu), ("sd", factors.sd)):
            (folder / SIZE_FACTORS[which]).write_bytes(pickle.dumps(content, protocol=4))
            named[f"{which}_size_factor"] = SIZE_FACTORS[which]
        notes.append("library sizes of all cells and numbers of cells are left out: upstream has no place for them")
        joint = joint or (len(factors.mu) == 1 and next(iter(factors.mu)) not in classes)
    else:
        notes.append("the model has no library sizes per class: upstream would generate cells of one count")
    if joint and len(classes) != 2:
        notes.append(f"upstream reads size factors of exactly two labels together; the model has {len(classes)}")
    state = _state(vae, flow, raw)
    torch.save(
        {"epoch": 0, "global_step": 0, "pytorch-lightning_version": LIGHTNING, "state_dict": state}, folder / CHECKPOINT
    )
    write_upstream_config(vae, flow, values, files=named, joint=joint, path=folder / CONFIG)
    notes.append("optimizers in the configuration are upstream's defaults: they are needed to build its module")
    if flow is not None:
        notes.append("ema_model.step is 0: the number of updates of the average is not part of our model")
    return notes


def _state(vae: LoadedVAE, flow: LoadedFlow | None, raw: LoadedFlow | None) -> dict[str, Tensor]:
    own = vae_state_to_upstream(vae.vae.state_dict(), vae.vae.config)
    state = {f"vae_model.{name}": value for name, value in own.items()}
    if flow is None or raw is None:
        return state
    averaged, weights = (_dit_state(f) for f in (flow, raw))
    state |= {f"diffusion_model.{name}": value for name, value in weights.items()}
    state |= {"ema_model.initted": torch.tensor(True), "ema_model.step": torch.tensor(0)}
    state |= {f"ema_model.online_model.{name}": value for name, value in weights.items()}
    state |= {f"ema_model.ema_model.{name}": value for name, value in averaged.items()}
    return state


def _dit_state(flow: LoadedFlow) -> dict[str, Tensor]:
    state = dit_state_to_upstream(flow.dit.state_dict())
    if flow.dit.config.label_dropout > 0:
        return state
    for name, value in state.items():  # upstream has no null class if it never drops a label
        if name.startswith("class_embeddings."):
            if value[-1].any():
                raise CheckpointError(
                    f"label_dropout is 0, but the null class of {name} is not zero: upstream has none"
                )
            state[name] = value[:-1].clone()
    return state


def _check_reads_back(folder: Path, vae: LoadedVAE, flow: LoadedFlow | None) -> None:
    """Raise if the written configuration does not describe the given model."""
    settings = read_settings(folder / CONFIG)
    wanted = [vae.vae.config, vae.vae.n_genes]
    read: list[Any] = [settings.vae, settings.n_genes]
    if flow is not None and settings.flow is not None:
        wanted += [flow.dit.config, flow.path, flow.vocabulary.n_classes]
        read += [settings.flow.dit, settings.flow.path, settings.flow.class_vocab_sizes]
    if wanted != read or (flow is None) != (settings.flow is None):
        raise CheckpointError(f"the exported configuration reads back as {read}, not as {wanted}: please report this")
