"""Convert upstream's Lightning checkpoints to our model folders.

    DIR/vae     the VAE
    DIR/flow    for a latent-diffusion checkpoint: model.safetensors averaged weights, raw.safetensors the others

Every key of the checkpoint is used, equal to one that is used, or an error that names it. What is not converted
(optimizer state, loops) is listed in the report and on the model card. DIR is written under another name and renamed.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from scldm.checkpoints.convert.report import ConversionReport
from scldm.checkpoints.native import save_flow, save_vae
from scldm.checkpoints.output_folder import atomic_folder, check_output
from scldm.checkpoints.untrusted.reader import ForeignCheckpoint, read_checkpoint
from scldm.checkpoints.upstream.inputs import InputFiles, Inputs, gather_inputs
from scldm.checkpoints.upstream.layout import UpstreamParts, split_state_dict
from scldm.checkpoints.upstream.names_dit import dit_state_from_upstream, dit_state_to_upstream
from scldm.checkpoints.upstream.names_vae import vae_state_from_upstream, vae_state_to_upstream
from scldm.checkpoints.upstream.settings import FlowSettings, UpstreamSettings, read_settings
from scldm.errors import CheckpointError
from scldm.nn.dit import DiT
from scldm.nn.vae import VAE

N_SHOWN = 12  # problems in one message


@dataclass(frozen=True)
class ConversionResult:
    """Folders of a converted model, and the report of its conversion."""

    vae: Path
    flow: Path | None
    report: ConversionReport


@dataclass(frozen=True)
class _Networks:
    vae: VAE
    flow_weights: dict[str, dict[str, Tensor]] = field(default_factory=dict)  # "model" averaged, "raw" not


def convert_upstream(
    checkpoint: Path,
    config: Path,
    out: Path,
    *,
    given: InputFiles | None = None,
    genes_seq_len: int | None = None,
    force: bool = False,
    foreign: ForeignCheckpoint | None = None,
) -> ConversionResult:
    """Convert a checkpoint of upstream's VAE or LatentDiffusion.

    Args:
        checkpoint: The `.ckpt` file; read as untrusted, in a child process.
        config: The YAML file that was written with it.
        out: Folder to write.
        given: Files with gene names, classes and size factors, instead of those that the configuration names.
        genes_seq_len: Tokens of a cell, including pads, instead of the configuration's.
        force: Replace an earlier conversion in `out`.
        foreign: Result of `read_checkpoint` for the file, if it was read before.

    Raises:
        CheckpointError: Something is missing, unknown, contradictory or not allowed.
    """
    check_output(out, force=force, is_earlier=_is_converted)
    settings = read_settings(config, genes_seq_len=genes_seq_len)
    foreign = foreign or read_checkpoint(checkpoint)
    parts = split_state_dict(foreign.state)
    _check_kind(checkpoint, config, parts, settings)
    report = ConversionReport.begin(checkpoint, config, settings, foreign, parts)
    networks = _build(parts, settings, report.notes)
    inputs = gather_inputs(given or InputFiles(), settings, checkpoint=checkpoint, config=config, about=foreign.about)
    report.sources.update(inputs.sources)
    report.notes.extend(inputs.notes)
    with atomic_folder(out) as folder:
        _write(folder, networks, settings, inputs, report)
    return ConversionResult(out / "vae", out / "flow" if settings.flow is not None else None, report)


def _check_kind(checkpoint: Path, config: Path, parts: UpstreamParts, settings: UpstreamSettings) -> None:
    """Raise if the checkpoint does not hold exactly the parts that its configuration describes."""
    has = {"vae_model": parts.vae, "diffusion_model": parts.dit, "ema_model.ema_model": parts.ema}
    wanted = {"vae_model"} if settings.kind == "vae" else set(has)
    missing = [name for name in has if name in wanted and not has[name]]
    extra = [name for name in has if name not in wanted and has[name]]
    target = {"vae": "models.VAE", "ldm": "models.LatentDiffusion"}[settings.kind]
    if missing:
        raise CheckpointError(f"{checkpoint} has no {', '.join(missing)}, but {config} describes a {target}")
    if extra:
        raise CheckpointError(f"{checkpoint} has {', '.join(extra)}, but {config} describes a {target}: another file?")


def _build(parts: UpstreamParts, settings: UpstreamSettings, notes: list[str]) -> _Networks:
    with torch.device("meta"):  # shapes without memory: a wrong size in the configuration may be a huge one
        shapes = VAE(settings.vae, n_genes=settings.n_genes).state_dict()
    _check_shapes(parts.vae, vae_state_to_upstream(shapes, settings.vae), prefix="vae_model.")
    vae = VAE(settings.vae, n_genes=settings.n_genes)
    pads = settings.vae.genes_seq_len is not None
    vae.load_state_dict(_in_single_precision(vae_state_from_upstream(parts.vae, pads=pads), notes))
    if settings.flow is None:
        return _Networks(vae)
    with torch.device("meta"):
        expected = dit_state_to_upstream(_new_dit(settings.flow).state_dict())
    weights = {}
    for name, prefix, state in (("raw", "diffusion_model.", parts.dit), ("model", "ema_model.ema_model.", parts.ema)):
        if settings.flow.dit.label_dropout == 0:
            state = _with_null_rows(state, settings.flow, notes)
        _check_shapes(state, expected, prefix=prefix)
        weights[name] = _in_single_precision(dit_state_from_upstream(state), notes)
    return _Networks(vae, weights)


def _new_dit(flow: FlowSettings) -> DiT:
    return DiT(
        flow.dit,
        n_latent_tokens=flow.n_latent_tokens,
        latent_width=flow.latent_width,
        n_classes=flow.class_vocab_sizes,
    )


def _check_shapes(state: Mapping[str, Tensor], expected: Mapping[str, Tensor], *, prefix: str) -> None:
    """Compare names and shapes of a part with those that the configuration requires."""
    problems = [
        f"{prefix}{n} is in the checkpoint, but not required by the configuration" for n in state if n not in expected
    ]
    problems += [
        f"{prefix}{n} is required by the configuration, but not in the checkpoint" for n in expected if n not in state
    ]
    problems += [
        f"{prefix}{name} is {tuple(value.shape)} in the checkpoint, {tuple(expected[name].shape)} by the configuration"
        for name, value in state.items()
        if name in expected and value.shape != expected[name].shape
    ]
    if problems:
        more = f"\n  … and {len(problems) - N_SHOWN} more" if len(problems) > N_SHOWN else ""
        raise CheckpointError(
            "the checkpoint and its configuration do not match:\n  " + "\n  ".join(problems[:N_SHOWN]) + more
        )


def _with_null_rows(state: Mapping[str, Tensor], flow: FlowSettings, notes: list[str]) -> dict[str, Tensor]:
    """Add a null class of zeros: upstream has none if it never drops a label, ours always has one."""
    out = dict(state)
    for label, n in flow.class_vocab_sizes.items():
        name = f"class_embeddings.{label}.weight"
        if name in out and len(out[name]) == n:
            out[name] = torch.cat([out[name], out[name].new_zeros(1, out[name].shape[1])])
            notes.append(
                f"{label} was trained without a null class: only conditional sampling at guidance 1 is meaningful"
            )
    return out


def _in_single_precision(state: Mapping[str, Tensor], notes: list[str]) -> dict[str, Tensor]:
    kinds = {str(v.dtype) for v in state.values() if v.is_floating_point()} - {"torch.float32"}
    if kinds:
        notes.append(f"weights of type {', '.join(sorted(kinds))} are kept as torch.float32")
    return {name: value.float() for name, value in state.items()}


def _write(
    folder: Path, networks: _Networks, settings: UpstreamSettings, inputs: Inputs, report: ConversionReport
) -> None:
    card = report.card()
    save_vae(folder / "vae", networks.vae, inputs.vocabulary, inputs.library_sizes, card=card)
    if settings.flow is not None:
        save_flow(
            folder / "flow",
            networks.flow_weights,
            config=settings.flow.dit,
            path=settings.flow.path,
            latent_shape=(settings.flow.n_latent_tokens, settings.flow.latent_width),
            vocabulary=inputs.vocabulary,
            library_sizes=inputs.library_sizes,
            card=card,
        )


def _is_converted(folder: Path) -> bool:
    return {p.name for p in folder.iterdir()} <= {"vae", "flow"} and (folder / "vae" / "config.json").is_file()
