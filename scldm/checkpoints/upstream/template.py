"""Write the configuration that builds upstream's module of one of our models. Every value is written out."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from scldm.checkpoints.native import LoadedFlow, LoadedVAE
from scldm.checkpoints.upstream.config import DECODER_SIZES
from scldm.checkpoints.upstream.yaml import write_yaml

# Our name of a setting of the VAE -> the name that `vae_config_from_upstream` reads.
VAE_FIELDS = {
    "d_model": "n_embed",
    "n_layers": "n_layer",
    "n_heads": "n_head",
    "n_heads_cross": "n_head_cross",
    "n_latent_tokens": "n_inducing_points",
    "latent_width": "n_latent",
    "input": "agg",
    "shared_embedding": "shared",
    "zero_positions": "pos",
    "bias": "bias",
    "multiple_of": "multiple_of",
    "eps": "eps",
    "temperature": "t",
    "adaln": "use_adaln",
}
_PATHS = {"linear": "Linear", "gvp": "GVP", "vp": "VP"}
_OPTIMIZER = {"_target_": "torch.optim.AdamW", "_partial_": True, "lr": 5e-4, "weight_decay": 0.0}
_VAE_OPTIMIZER = {
    "_target_": "scldm.optimizers.AdamWLegacy",
    "_partial_": True,
    "lr": 1e-3,
    "weight_decay": 0.0,
    "betas": [0.9, 0.95],
    "caution": False,
}


def write_upstream_config(
    vae: LoadedVAE,
    flow: LoadedFlow | None,
    values: Mapping[str, Any],
    *,
    files: Mapping[str, str],
    joint: bool,
    path: Path,
) -> None:
    """Write the YAML file of a VAE, or of a VAE and its flow.

    Args:
        vae: The VAE.
        flow: The flow on its latents, if any.
        values: The VAE's settings under the names of VAE_FIELDS.
        files: Names of metadata_json, metadata_genes, mu_size_factor and sd_size_factor in the configuration's folder.
        joint: Whether size factors are kept per combination of labels.
        path: File to write.
    """
    source = vae if flow is None else flow
    module: dict[str, Any] = {
        "_target_": "scldm.models.VAE" if flow is None else "scldm.models.LatentDiffusion",
        "vae_model": _vae(values, vae.vae.n_genes),
        "vae_optimizer": _VAE_OPTIMIZER,
        "vae_scheduler": None,
    }
    if flow is not None:
        module |= {
            "vae_as_tokenizer": {"train": False},
            "diffusion_model": _dit(flow),
            "transport": _transport(flow),
            "diffusion_optimizer": _OPTIMIZER,
            "diffusion_scheduler": None,
        }
    classes = source.vocabulary.n_classes
    encoder = {
        "_target_": "scldm.encoder.VocabularyEncoderSimplified",
        "adata_path": None,
        "mask_token": "<MASK>",
        "mask_token_idx": 0,
        "n_genes": vae.vae.n_genes,
        "class_vocab_sizes": classes,
        "guidance_weight": dict.fromkeys(classes, 1.0),
        "condition_strategy": "joint" if joint else "mutually_exclusive",
        **{name: files.get(name) for name in ("mu_size_factor", "sd_size_factor", "metadata_genes", "metadata_json")},
    }
    data = {
        "_target_": "scldm.datamodule.DataModule",
        "train_adata_path": None,
        "test_adata_path": None,
        "vocabulary_encoder": "${datamodule.vocabulary_encoder}",
        "sample_genes": "expressed",
        "genes_seq_len": vae.vae.config.genes_seq_len,
    }
    write_yaml(path, {"model": {"module": module}, "datamodule": {"datamodule": data, "vocabulary_encoder": encoder}})


def _vae(values: Mapping[str, Any], n_genes: int) -> dict[str, Any]:
    of_decoder = {name: values.get(f"{name}_dec", values[name]) for name in DECODER_SIZES}
    encoder, decoder = _blocks(values, values), _blocks(values, of_decoder)
    head: dict[str, Any] = {
        "_target_": "scldm.stochastic_layers.GaussianTransformerLayer",
        "n_embed": of_decoder["n_embed"],
        "norm_layer": "layernorm",
        "layernorm_eps": values.get("eps_head", of_decoder["eps"]),
    }
    if values["head"] != "gaussian":
        head["_target_"] = "scldm.stochastic_layers.NegativeBinomialTransformerLayer"
        head |= {"n_genes": n_genes, "shared_theta": values["head"] == "nb_shared", "t": values["t"]}
    return {
        "_target_": "scldm.vae.TransformerVAE",
        "encoder": {"_target_": "scldm.nnets.Encoder", **encoder, "positional_encoding": values["pos"]},
        "decoder": {
            "_target_": "scldm.nnets.Decoder",
            "n_genes": n_genes,
            **decoder,
            "shared_embedding": values["shared"],
            "use_adaln": values.get("use_adaln", False),
        },
        "input_layer": {
            "_target_": "scldm.layers.InputTransformerVAE",
            "n_genes": n_genes,
            "n_embed": values["n_embed"],
            "agg_func": values["agg"],
        },
        "decoder_head": head,
    }


def _blocks(values: Mapping[str, Any], sizes: Mapping[str, Any]) -> dict[str, Any]:
    """Return the arguments that upstream's encoder and decoder share; `sizes` are those of one of them."""
    return {
        **{name: sizes[name] for name in ("n_layer", "n_embed", "n_head", "n_head_cross", "multiple_of", "bias")},
        "n_inducing_points": values["n_inducing_points"],
        "n_embed_latent": values["n_latent"],
        "dropout": 0.0,
        "norm_layer": "layernorm",
        "layernorm_eps": sizes["eps"],
    }


def _dit(flow: LoadedFlow) -> dict[str, Any]:
    config = flow.dit.config
    return {
        "_target_": "scldm.nnets.DiT",
        "n_embed": config.d_model,
        "n_embed_input": flow.latent_width,
        "seq_len": flow.n_latent_tokens,
        "n_layer": config.n_layers,
        "n_head": config.n_heads,
        "dropout": 0.0,
        "bias": config.bias,
        "norm_layer": "layernorm",
        "multiple_of": config.multiple_of,
        "layernorm_eps": config.eps,
        "class_vocab_sizes": flow.vocabulary.n_classes,
        "cfg_dropout_prob": config.label_dropout,
        "condition_strategy": config.strategy,
    }


def _transport(flow: LoadedFlow) -> dict[str, Any]:
    return {
        "_target_": "scldm.transport.create_transport",
        "path_type": _PATHS[flow.path.path],
        "prediction": flow.path.prediction,
        "loss_weight": None if flow.path.weight == "none" else flow.path.weight,
    }
