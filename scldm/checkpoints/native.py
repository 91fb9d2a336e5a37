"""The exported model: one folder, no pickle.

    model.safetensors   weights (for a flow: the averaged ones; the raw ones in raw.safetensors)
    config.json         kind, choices and sizes needed to build the network again
    vocabulary.json     genes and label classes, by name
    label_vectors.safetensors   of labels that are names with vectors
    library_size.json   log-normal statistics per condition
    README.md           the model card

The folder is written under another name and renamed, so that it is never incomplete.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from scldm.data.library_size import LibrarySizes
from scldm.data.vocabulary import Vocabulary
from scldm.errors import CheckpointError
from scldm.flow.config import ControlStart, Distilled, PathConfig
from scldm.nn.config import DiTConfig, VAEConfig
from scldm.nn.dit import ClassFeatures, DiT
from scldm.nn.vae import VAE

FORMAT = 1
__all__ = [
    "CheckpointError",
    "LoadedFlow",
    "LoadedVAE",
    "class_features",
    "folder_digest",
    "load_flow",
    "load_vae",
    "new_dit",
    "save_flow",
    "save_vae",
]


@dataclass(frozen=True)
class LoadedVAE:
    """A VAE read from a model folder, with the facts about its data."""

    vae: VAE
    vocabulary: Vocabulary
    library_sizes: LibrarySizes


@dataclass(frozen=True)
class LoadedFlow:
    """A flow read from a model folder, with the facts about its data."""

    dit: DiT
    path: PathConfig
    vocabulary: Vocabulary
    library_sizes: LibrarySizes
    n_latent_tokens: int
    latent_width: int
    start: ControlStart | None = None  # what it was trained from beside noise
    distilled: Distilled | None = None  # how its network jumps; None: it is a velocity field


def save_vae(folder: Path, vae: VAE, vocabulary: Vocabulary, library_sizes: LibrarySizes, *, card: str) -> None:
    """Write a trained VAE as a model folder."""
    config = {"kind": "vae", "config": vae.config.model_dump(mode="json"), "n_genes": vae.n_genes}
    _save(folder, {"model": vae.state_dict()}, config, vocabulary, library_sizes, card)


def save_flow(
    folder: Path,
    weights: Mapping[str, Mapping[str, Tensor]],
    *,
    config: DiTConfig,
    path: PathConfig,
    latent_shape: tuple[int, int],
    vocabulary: Vocabulary,
    library_sizes: LibrarySizes,
    card: str,
    start: ControlStart | None = None,
    distilled: Distilled | None = None,
) -> None:
    """Write a trained flow as a model folder.

    Args:
        folder: Folder to write; replaced if it exists.
        weights: {"model": averaged weights, "raw": the weights themselves}.
        config: Settings of the network.
        path: Path and prediction of the flow.
        latent_shape: (m, e) of the VAE on whose latents it was trained.
        vocabulary: Genes and label classes.
        library_sizes: Statistics of library sizes.
        card: Text of README.md.
        start: What it was trained from beside noise; None: from noise only.
        distilled: How its network jumps; None: it is a velocity field.
    """
    about = {
        "kind": "flow",
        "config": config.model_dump(mode="json"),
        "path": path.model_dump(mode="json"),
        "latent_shape": list(latent_shape),
    }
    if start is not None:
        about["start"] = start.model_dump(mode="json")
    if distilled is not None:
        about["distilled"] = distilled.model_dump(mode="json")
    _save(folder, weights, about, vocabulary, library_sizes, card)


def load_vae(folder: Path, *, device: str | torch.device = "cpu") -> LoadedVAE:
    """Read a VAE's model folder. The module is in eval mode and its parameters need no gradients.

    Raises:
        CheckpointError: The folder is missing, damaged, or holds another kind of model.
    """
    with _named_errors(folder):
        about = _read_config(folder, "vae")
        vae = VAE(VAEConfig.model_validate(about["config"]), n_genes=about["n_genes"])
        vocabulary = Vocabulary.load(folder / "vocabulary.json")
        if vocabulary.n_genes != vae.n_genes:
            raise CheckpointError(f"{folder}: the vocabulary has {vocabulary.n_genes} genes, the model {vae.n_genes}")
        _load_weights(vae, folder / "model.safetensors")
        return LoadedVAE(_frozen(vae, device), vocabulary, LibrarySizes.load(folder / "library_size.json"))


def load_flow(folder: Path, *, weights: str = "ema", device: str | torch.device = "cpu") -> LoadedFlow:
    """Read a flow's model folder.

    Args:
        folder: Model folder.
        weights: "ema", the averaged weights, or "raw".
        device: Device of the module.

    Raises:
        CheckpointError: The folder is missing, damaged, or holds another kind of model.
    """
    file = {"ema": "model.safetensors", "raw": "raw.safetensors"}[weights]
    with _named_errors(folder):
        about = _read_config(folder, "flow")
        vocabulary = Vocabulary.load(folder / "vocabulary.json")
        m, e = about["latent_shape"]
        config = DiTConfig.model_validate(about["config"])
        start = None if "start" not in about else ControlStart.model_validate(about["start"])
        dit = new_dit(config, vocabulary, latent_shape=(m, e), from_controls=start is not None)
        _load_weights(dit, folder / file)
        sizes = LibrarySizes.load(folder / "library_size.json")
        path = PathConfig.model_validate(about["path"])
        if start is not None:
            vocabulary.label(start.label).encode([start.control])
        distilled = None if "distilled" not in about else Distilled.model_validate(about["distilled"])
        return LoadedFlow(_frozen(dit, device), path, vocabulary, sizes, m, e, start, distilled)


def new_dit(
    config: DiTConfig, vocabulary: Vocabulary, *, latent_shape: tuple[int, int], from_controls: bool = False
) -> DiT:
    """Return a network with new weights for the labels of a vocabulary, drawn from torch's global generator.

    Args:
        latent_shape: (m, e).
        from_controls: Whether it also has a field that starts at control cells.
    """
    m, e = latent_shape
    return DiT(
        config, n_latent_tokens=m, latent_width=e, n_classes=vocabulary.n_classes, features=class_features(vocabulary),
        from_controls=from_controls,
    )  # fmt: skip


def class_features(vocabulary: Vocabulary) -> dict[str, ClassFeatures]:
    """Return the features of classes, for labels whose classes are values."""
    return {
        x.name: ClassFeatures(torch.from_numpy(x.values.features(x.classes)), x.values.pooled)
        for x in vocabulary.labels
        if x.values is not None
    }


def folder_digest(folder: Path) -> str:
    """Return a hash of a model folder's weights and configuration, which identifies the model."""
    digest = hashlib.sha256()
    for path in sorted(folder.iterdir()):
        if path.name != "README.md":
            digest.update(path.name.encode())
            digest.update(path.read_bytes())
    return digest.hexdigest()


def _save(
    folder: Path,
    weights: Mapping[str, Mapping[str, Tensor]],
    about: Mapping[str, Any],
    vocabulary: Vocabulary,
    library_sizes: LibrarySizes,
    card: str,
) -> None:
    tmp = folder.with_name(f".{folder.name}.{os.getpid()}.tmp")
    shutil.rmtree(tmp, ignore_errors=True)
    tmp.mkdir(parents=True)
    for name, state in weights.items():
        save_file({k: v.detach().contiguous().cpu() for k, v in state.items()}, tmp / f"{name}.safetensors")
    (tmp / "config.json").write_text(json.dumps({"format": FORMAT, **about}, indent=1))
    vocabulary.save(tmp / "vocabulary.json")
    library_sizes.save(tmp / "library_size.json")
    (tmp / "README.md").write_text(card)
    shutil.rmtree(folder, ignore_errors=True)
    tmp.rename(folder)


@contextmanager
def _named_errors(folder: Path) -> Iterator[None]:
    """Raise errors of reading a folder that we did not write as one CheckpointError that names the folder."""
    try:
        yield
    except CheckpointError:
        raise
    except (OSError, ValueError, KeyError, TypeError, AttributeError, SafetensorError) as error:
        line = (str(error).splitlines() or ["no message"])[0]
        raise CheckpointError(
            f"{folder} is damaged, or not a model folder of scldm ({type(error).__name__}: {line[:200]}); copy it "
            "again, or convert an upstream checkpoint with `scldm convert`"
        ) from error


def _read_config(folder: Path, kind: str) -> dict[str, Any]:
    path = folder / "config.json"
    if not path.is_file():
        raise CheckpointError(f"{folder} is not a model folder: it has no config.json")
    about = json.loads(path.read_text())
    if not isinstance(about, dict):
        raise CheckpointError(f"{path} must hold a dictionary; it holds a {type(about).__name__}")
    found = about.get("format")
    if isinstance(found, int) and found > FORMAT:
        raise CheckpointError(
            f"{path} was written by a newer version of scldm (format {found}, this version reads {FORMAT}); "
            "upgrade scldm"
        )
    if found != FORMAT:
        raise CheckpointError(f"{path} has format {found!r}, and the only one so far is {FORMAT}: it is not ours")
    if about["kind"] != kind:
        raise CheckpointError(f"{folder} holds a {about['kind']}, not a {kind}")
    return about


def _load_weights(module: torch.nn.Module, path: Path) -> None:
    if not path.is_file():
        raise CheckpointError(f"{path} is missing: the weights cannot be loaded")
    state = load_file(path)
    own = module.state_dict()
    problems = [f"{k} is missing" for k in own.keys() - state.keys()]
    problems += [f"{k} is unknown to this model" for k in state.keys() - own.keys()]
    problems += [
        f"{k} has shape {tuple(state[k].shape)}, the model expects {tuple(own[k].shape)}"
        for k in own.keys() & state.keys()
        if own[k].shape != state[k].shape
    ]
    if problems:
        raise CheckpointError(f"{path}: " + "; ".join(sorted(problems)[:20]))
    module.load_state_dict(state)


def _frozen(module: Any, device: str | torch.device) -> Any:
    return module.to(device).eval().requires_grad_(False)
