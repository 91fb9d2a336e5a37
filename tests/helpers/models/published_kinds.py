"""Checkpoints in upstream's layout, of the kinds that it has published, made of weights and settings that it recorded.

A VAE and a DiT were recorded apart. Here they become one checkpoint as upstream's LatentDiffusion writes it, with the
configuration of a recorded checkpoint in which the sizes are those of the recordings.
"""

from __future__ import annotations

import json
import pickle
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from helpers.models.upstream_fixtures import FOLDER, Fixture, load_fixture
from scldm.checkpoints.convert.convert import ConversionResult, convert_upstream
from scldm.checkpoints.untrusted.reader import ForeignCheckpoint
from scldm.checkpoints.upstream.inputs import InputFiles

N_GENES = 60
GENES = tuple(f"Gene{i}" for i in range(N_GENES))
HEADS = {
    "nb_shared": "negative_binomial_shared_theta",
    "nb_unshared": "negative_binomial_unshared_theta",
    "gaussian": "gaussian",
}
AVERAGED = 1.01  # the average of a recorded weight, as a factor: recordings of single networks have none


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint before it is converted."""

    folder: Path
    foreign: ForeignCheckpoint
    gaussian: bool

    def convert(self, out: Path) -> ConversionResult:
        """Convert it as the command does; it is not a pickle, so that no other process reads it."""
        return convert_upstream(
            self.folder / "model.ckpt", self.folder / "config.yaml", out,
            given=InputFiles(no_size_factors=self.gaussian), foreign=self.foreign,
        )  # fmt: skip


def classes_of(label: str, n: int) -> list[str]:
    return [f"{label} {i}" for i in range(n)]


def write_checkpoint(folder: Path, vae: str, dit: str | None) -> Checkpoint:
    """Write the files of a checkpoint of a recorded VAE, and of a recorded DiT on its latents."""
    folder.mkdir(parents=True)
    network, flow = load_fixture(f"vae_{vae}"), None if dit is None else load_fixture(f"dit_{dit}")
    labels = {} if flow is None else flow.facts["config"]["class_vocab_sizes"]
    config = yaml.safe_load((FOLDER / "ckpt" / f"{'vae' if flow is None else 'ldm'}_config.yaml").read_text())
    _set_vae(config["model"], network.facts["config"])
    if flow is not None:
        _set_dit(config["model"]["module"]["diffusion_model"], flow.facts["config"])
    _set_names(config["datamodule"], labels, joint=flow is not None and _is_joint(flow))
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    names = {"genes": list(GENES), "labels": {name: classes_of(name, n) for name, n in labels.items()}}
    (folder / "names.json").write_text(json.dumps(names))
    if flow is not None:
        _write_size_factors(folder, names["labels"], joint=_is_joint(flow))
    (folder / "model.ckpt").write_bytes(b"")  # the weights are given beside it
    state = {f"vae_model.{k}": v for k, v in network.under("state/").items()}
    if flow is not None:
        state |= _flow_state(flow)
    head = network.facts["config"]["head"]
    return Checkpoint(folder, ForeignCheckpoint(state, {"epoch": 0, "global_step": 6}, {}, ()), head == "gaussian")


def _is_joint(flow: Fixture) -> bool:
    return bool(flow.facts["config"]["condition_strategy"] == "joint")


def _set_vae(model: dict[str, Any], recorded: dict[str, Any]) -> None:
    vae = model["module"]["vae_model"]
    vae["encoder"] |= {
        "n_layer": recorded["n_layer"], "n_inducing_points": recorded["n_inducing_points"],
        "n_embed": recorded["n_embed"], "n_embed_latent": recorded["n_latent"], "n_head": recorded["n_head"],
        "n_head_cross": recorded["n_head_cross"], "bias": recorded["bias"], "multiple_of": recorded["multiple_of"],
        "layernorm_eps": recorded["eps"], "positional_encoding": recorded["pos"],
    }  # fmt: skip
    vae["decoder"] |= {"shared_embedding": recorded["shared"], "use_adaln": recorded.get("use_adaln", False)}
    vae["input_layer"]["agg_func"] = recorded["agg"]
    model["decoder_name"] = HEADS[recorded["head"]]
    head = model["decoder_head"][model["decoder_name"]]
    head["n_embed"], head["layernorm_eps"] = recorded["n_embed"], recorded["eps"]
    if "n_genes" in head:
        head["n_genes"] = N_GENES
    if "t" in recorded:
        head["t"] = recorded["t"]


def _set_dit(dit: dict[str, Any], recorded: dict[str, Any]) -> None:
    same = ("n_embed", "n_embed_input", "seq_len", "n_layer", "n_head", "bias", "multiple_of", "layernorm_eps")
    dit |= {name: recorded[name] for name in (*same, "cfg_dropout_prob", "condition_strategy")}
    dit["class_vocab_sizes"] = dict(recorded["class_vocab_sizes"])  # a copy: YAML would write an alias


def _set_names(datamodule: dict[str, Any], labels: dict[str, int], *, joint: bool) -> None:
    datamodule["vocabulary_encoder"] |= {
        "n_genes": N_GENES, "class_vocab_sizes": dict(labels), "guidance_weight": dict.fromkeys(labels, 1.0),
        "condition_strategy": "joint" if joint else "mutually_exclusive", "metadata_json": "/data/names.json",
        "mu_size_factor": "/data/mu.pkl", "sd_size_factor": "/data/sd.pkl",
    }  # fmt: skip
    datamodule["dataset_params"]["dentate_gyrus"]["genes_seq_len"] = N_GENES


def _write_size_factors(folder: Path, labels: dict[str, list[str]], *, joint: bool) -> None:
    tables = {name: {c: 4.5 + 0.1 * i for i, c in enumerate(classes)} for name, classes in labels.items()}
    if joint:
        first, second = labels
        pairs = [f"{a}_{b}" for a in labels[first] for b in labels[second]]
        tables = {f"{first}_{second}": {pair: 4.5 + 0.01 * i for i, pair in enumerate(pairs)}}
    (folder / "mu.pkl").write_bytes(pickle.dumps(tables))
    (folder / "sd.pkl").write_bytes(pickle.dumps({name: dict.fromkeys(own, 0.3) for name, own in tables.items()}))


def _flow_state(flow: Fixture) -> dict[str, Any]:
    raw = flow.under("state/")
    state = {f"diffusion_model.{k}": v for k, v in raw.items()}
    state |= {f"ema_model.online_model.{k}": v.clone() for k, v in raw.items()}
    return state | {f"ema_model.ema_model.{k}": v * AVERAGED for k, v in raw.items()}
