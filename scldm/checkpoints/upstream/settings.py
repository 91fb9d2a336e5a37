"""Read what a converter needs from upstream's configuration: sizes and settings of the networks, path, file names.

Sizes of the decoder may differ from the encoder's, as in upstream's own classes. What must agree for the parts to fit
together (the width of input and encoder, of decoder and head, the latents) must agree here too. A setting that is not
understood is an error: it might change the mathematics.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from pydantic import ValidationError

from scldm.checkpoints.upstream.config import DECODER_SIZES, vae_config_from_upstream
from scldm.checkpoints.upstream.yaml import UpstreamYaml
from scldm.errors import CheckpointError
from scldm.flow.config import PathConfig
from scldm.nn.config import DiTConfig, VAEConfig

Kind = Literal["vae", "ldm"]
FILES = ("metadata_json", "metadata_genes", "adata_path", "mu_size_factor", "sd_size_factor")

_VAE = "model.module.vae_model"
_ENCODER, _DECODER, _INPUT, _HEAD = (f"{_VAE}.{n}" for n in ("encoder", "decoder", "input_layer", "decoder_head"))
_DIT, _TRANSPORT = "model.module.diffusion_model", "model.module.transport"
_BLOCKS = {"n_embed", "n_layer", "n_head", "dropout", "bias", "multiple_of", "layernorm_eps", "norm_layer"}
_BOTH = _BLOCKS | {"n_embed_latent", "n_inducing_points", "n_head_cross", "latent_projection_type"}
# Sizes that the decoder has of its own, under the names of `vae_config_from_upstream`, and their types.
_SIZES: dict[str, type] = dict.fromkeys(DECODER_SIZES, int) | {"eps": float, "bias": bool}
_YAML_NAMES = {"eps": "layernorm_eps"}
_PATHS = {"Linear": "linear", "GVP": "gvp", "VP": "vp"}


@dataclass(frozen=True)
class FlowSettings:
    """Settings of the DiT and its path."""

    dit: DiTConfig
    path: PathConfig
    n_latent_tokens: int
    latent_width: int
    class_vocab_sizes: dict[str, int]


@dataclass(frozen=True)
class UpstreamSettings:
    """Settings that are read from the YAML file."""

    kind: Kind
    vae: VAEConfig
    n_genes: int
    flow: FlowSettings | None
    class_vocab_sizes: dict[str, int]  # classes per label, in the order in which joint size factors are named
    joint: bool  # whether size factors are kept per combination of labels
    files: dict[str, str | None]  # name in FILES -> path that the configuration names
    left_behind: list[str] = field(default_factory=list)  # settings that have no place in our model


def read_settings(path: Path, *, genes_seq_len: int | None = None) -> UpstreamSettings:
    """Read a configuration that upstream's training wrote.

    Args:
        path: The YAML file.
        genes_seq_len: Tokens of a cell, including pads, instead of the file's.

    Raises:
        CheckpointError: Settings are missing, unknown or contradictory; the message lists all of them.
    """
    y = UpstreamYaml(path)
    left: list[str] = []
    kinds: dict[str, Kind] = {"models.VAE": "vae", "models.LatentDiffusion": "ldm"}
    kind = y.target("model.module", kinds)
    y.target(_VAE, {"vae.TransformerVAE": True})
    values = _vae_values(y, left)
    before = len(y.problems)
    n_genes = y.value(f"{_INPUT}.n_genes", int)
    if n_genes < 1 and len(y.problems) == before:
        y.problems.append(f"{_INPUT}.n_genes must be > 0; got {n_genes}")
    for at in (f"{_DECODER}.n_genes", f"{_HEAD}.n_genes"):
        y.same(at, n_genes, like=f"{_INPUT}.n_genes")
    length = genes_seq_len or y.value("datamodule.datamodule.genes_seq_len", int, None)
    if length is None:
        y.problems.append("datamodule.datamodule.genes_seq_len is missing: give it with --genes-seq-len")
    if (mode := y.optional("datamodule.datamodule.sample_genes", str)) not in (None, "expressed"):
        left.append(f"sample_genes {mode}: here a cell is its expressed genes and pads up to genes_seq_len")
    encoder = next((n for n in ("vocabulary_encoder", "label_encoder") if y.keys(f"datamodule.{n}")), None)
    at = f"datamodule.{encoder or 'vocabulary_encoder'}"
    classes = _class_sizes(y, f"{at}.class_vocab_sizes")
    strategy = y.optional(f"{at}.condition_strategy", str)
    flow = _flow_values(y, left) if kind == "ldm" else None
    y.raise_problems()
    assert kind is not None
    try:
        config = vae_config_from_upstream(values, genes_seq_len=length)
        built = (
            None if flow is None else FlowSettings(DiTConfig(**flow.pop("dit")), PathConfig(**flow.pop("path")), **flow)
        )
    except (ValidationError, ValueError, KeyError) as error:
        raise CheckpointError(f"{path} cannot be used:\n  {_reasons(error)}") from None
    if built is not None:
        _check_latents(path, built, config)
        classes = classes or built.class_vocab_sizes
        if classes != built.class_vocab_sizes:
            own = f"{_DIT}.class_vocab_sizes is {built.class_vocab_sizes}"
            raise CheckpointError(f"{path}: {at}.class_vocab_sizes is {classes}, but {own}")
    files = {name: y.optional(f"{at}.{name}", str) for name in FILES}
    return UpstreamSettings(kind, config, n_genes, built, classes, strategy == "joint", files, left)


def _vae_values(y: UpstreamYaml, left: list[str]) -> dict[str, Any]:
    """Return the values that `vae_config_from_upstream` takes."""
    y.target(_ENCODER, {"nnets.Encoder": True})
    y.target(_DECODER, {"nnets.Decoder": True})
    y.target(_INPUT, {"layers.InputTransformerVAE": True})
    y.only(_ENCODER, _BOTH | {"positional_encoding"})
    y.only(_DECODER, _BOTH | {"n_genes", "shared_embedding", "use_adaln"})
    y.only(_INPUT, {"n_genes", "n_embed", "agg_func"})
    sizes: dict[str, Any] = {
        name: y.value(f"{_ENCODER}.{_YAML_NAMES.get(name, name)}", kind) for name, kind in _SIZES.items()
    }
    of_decoder: dict[str, Any] = {
        f"{name}_dec": y.value(f"{_DECODER}.{_YAML_NAMES.get(name, name)}", kind, sizes[name])
        for name, kind in _SIZES.items()
    }
    points, width = y.value(f"{_ENCODER}.n_inducing_points", int), y.value(f"{_ENCODER}.n_embed_latent", int)
    y.value(f"{_DECODER}.n_inducing_points", int, points)  # upstream's decoder does not read it
    y.same(f"{_DECODER}.n_embed_latent", width, like=f"{_ENCODER}.n_embed_latent")
    y.same(f"{_INPUT}.n_embed", sizes["n_embed"], like=f"{_ENCODER}.n_embed")
    for at in (_ENCODER, _DECODER):
        y.same(f"{at}.norm_layer", "layernorm", like="the only norm")
        y.same(f"{at}.latent_projection_type", "mlp", like="the only projection")
        if dropout := y.value(f"{at}.dropout", float, 0.0):
            left.append(f"{at}.dropout {dropout}: our model has no dropout (of no effect once trained)")
    return {
        **sizes,
        **of_decoder,
        "n_inducing_points": points,
        "n_latent": width,
        "agg": y.value(f"{_INPUT}.agg_func", str),
        "pos": y.value(f"{_ENCODER}.positional_encoding", bool, False),
        "shared": y.value(f"{_DECODER}.shared_embedding", bool),
        "use_adaln": y.value(f"{_DECODER}.use_adaln", bool, False),
        **_head_values(y, of_decoder["n_embed_dec"]),
    }


def _head_values(y: UpstreamYaml, n_embed: int) -> dict[str, Any]:
    known = {f"stochastic_layers.{n}": n for n in ("NegativeBinomialTransformerLayer", "GaussianTransformerLayer")}
    head = y.target(_HEAD, known)
    y.same(f"{_HEAD}.n_embed", n_embed, like=f"{_DECODER}.n_embed")
    if head == "GaussianTransformerLayer":
        y.only(_HEAD, {"n_embed", "norm_layer", "layernorm_eps"})
        return {"head": "gaussian", "eps_head": y.value(f"{_HEAD}.layernorm_eps", float, 1e-8)}
    y.only(_HEAD, {"n_genes", "shared_theta", "n_embed", "norm_layer", "layernorm_eps", "eps_", "t"})
    shared = y.value(f"{_HEAD}.shared_theta", bool, False)
    return {"head": "nb_shared" if shared else "nb_unshared", "t": y.value(f"{_HEAD}.t", float, 1.0)}


def _flow_values(y: UpstreamYaml, left: list[str]) -> dict[str, Any]:
    """Return the arguments of FlowSettings, with those of DiTConfig and PathConfig as dictionaries."""
    y.target(_DIT, {"nnets.DiT": True})
    own = {"n_embed_input", "seq_len", "class_vocab_sizes", "cfg_dropout_prob", "condition_strategy"}
    y.only(_DIT, _BLOCKS | own)
    y.same(f"{_DIT}.norm_layer", "layernorm", like="the only norm")
    if dropout := y.value(f"{_DIT}.dropout", float, 0.0):
        left.append(f"{_DIT}.dropout {dropout}: our model has no dropout (of no effect once trained)")
    dit = {
        "d_model": y.value(f"{_DIT}.n_embed", int),
        "n_layers": y.value(f"{_DIT}.n_layer", int),
        "n_heads": y.value(f"{_DIT}.n_head", int),
        "label_dropout": y.value(f"{_DIT}.cfg_dropout_prob", float, 0.1),
        "strategy": y.value(f"{_DIT}.condition_strategy", str, "mutually_exclusive"),
        "bias": y.value(f"{_DIT}.bias", bool),
        "multiple_of": y.value(f"{_DIT}.multiple_of", int),
        "eps": y.value(f"{_DIT}.layernorm_eps", float),
    }
    return {
        "dit": dit,
        "path": _path_values(y, left),
        "n_latent_tokens": y.value(f"{_DIT}.seq_len", int),
        "latent_width": y.value(f"{_DIT}.n_embed_input", int),
        "class_vocab_sizes": _class_sizes(y, f"{_DIT}.class_vocab_sizes"),
    }


def _path_values(y: UpstreamYaml, left: list[str]) -> dict[str, Any]:
    y.target(_TRANSPORT, {"transport.create_transport": True})
    y.only(_TRANSPORT, {"path_type", "prediction", "loss_weight", "train_eps", "sample_eps"})
    path, prediction = (
        y.value(f"{_TRANSPORT}.path_type", str, "Linear"),
        y.value(f"{_TRANSPORT}.prediction", str, "velocity"),
    )
    weight = y.value(f"{_TRANSPORT}.loss_weight", str, None) or "none"
    if path not in _PATHS:
        y.problems.append(f"{_TRANSPORT}.path_type is {path!r}; known: {', '.join(_PATHS)}")
    if prediction == "velocity" and weight != "none":
        left.append(f"loss_weight {weight}: upstream does not use it with a velocity prediction")
        weight = "none"
    for name in ("train_eps", "sample_eps"):
        if (eps := y.value(f"{_TRANSPORT}.{name}", float, None)) is not None:
            left.append(f"{name} {eps}: the ends of the interval are those of scldm.flow.path")
    return {"path": _PATHS.get(path, "linear"), "prediction": prediction, "weight": weight}


def _class_sizes(y: UpstreamYaml, at: str) -> dict[str, int]:
    sizes = y.mapping(at) or {}
    y.problems += [
        f"{at}.{k} must be a whole number > 0; got {n!r}" for k, n in sizes.items() if type(n) is not int or n < 1
    ]
    return sizes


def _reasons(error: Exception) -> str:
    if not isinstance(error, ValidationError):
        return str(error)
    rows = ((".".join(map(str, e["loc"])), e["msg"].removeprefix("Value error, "), e["input"]) for e in error.errors())
    return "\n  ".join(f"{field}: {message}; got {value!r}" if field else message for field, message, value in rows)


def _check_latents(path: Path, flow: FlowSettings, vae: VAEConfig) -> None:
    for name, own, of_vae in (
        ("seq_len", flow.n_latent_tokens, vae.n_latent_tokens),
        ("n_embed_input", flow.latent_width, vae.latent_width),
    ):
        if own != of_vae:
            raise CheckpointError(f"{path}: {_DIT}.{name} is {own}, but the VAE's latents have {of_vae}")
