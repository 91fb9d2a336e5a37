"""The commands `scldm convert`, `scldm export` and `scldm presets`: upstream's checkpoints to our model
folders and back, and the named models of the paper as settings.
"""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

from pipeline.cli.common import reported
from scldm.api.presets import Preset

Name = Annotated[str | None, typer.Argument(metavar="[NAME]", help="A preset; without it, all are listed.")]


Checkpoint = Annotated[Path, typer.Argument(metavar="UPSTREAM.ckpt", help="Lightning checkpoint that upstream wrote.")]
ConfigFile = Annotated[Path, typer.Option("--config", metavar="UPSTREAM.yaml", help="Configuration written with it.")]
Out = Annotated[Path, typer.Option("--out", metavar="DIR", help="Folder to make.")]
Force = Annotated[bool, typer.Option("--force", help="Replace what this command made there before.")]
GenesFile = Annotated[
    Path | None,
    typer.Option("--genes", metavar="FILE", help="Gene ids in order: .h5ad, .parquet, .json, .csv or .txt."),
]
MetadataFile = Annotated[
    Path | None,
    typer.Option("--metadata", metavar="FILE", help="Classes in order: upstream's metadata .json, or .h5ad."),
]
MuFile = Annotated[
    Path | None, typer.Option("--size-factors-mu", metavar="FILE", help="Pickle: mean log library sizes.")
]
SdFile = Annotated[Path | None, typer.Option("--size-factors-sd", metavar="FILE", help="Pickle: their deviations.")]
NoSizes = Annotated[
    bool, typer.Option("--no-size-factors", help="Convert without library sizes; such a flow generates no counts.")
]
SeqLen = Annotated[
    int | None,
    typer.Option("--genes-seq-len", min=1, help="Tokens of a cell, pads included; default: the configuration's."),
]
ModelPlace = Annotated[
    str,  # a Path would change hf://
    typer.Argument(
        metavar="MODEL",
        help="Folder with vae/ and flow/, a model folder, a stage, a pipeline, models:/…, hf://… or s3://….",
    ),
]
FlowFolder = Annotated[
    Path | None, typer.Option("--flow", metavar="DIR", help="Model folder of a flow, if MODEL does not have it.")
]


class Target(StrEnum):
    upstream = "upstream"
    huggingface = "huggingface"


def convert(
    checkpoint: Checkpoint,
    config: ConfigFile,
    out: Out,
    genes: GenesFile = None,
    metadata: MetadataFile = None,
    size_factors_mu: MuFile = None,
    size_factors_sd: SdFile = None,
    no_size_factors: NoSizes = False,
    genes_seq_len: SeqLen = None,
    force: Force = False,
) -> None:
    """Turn a checkpoint of upstream scLDM into our model folders, DIR/vae and DIR/flow.

    The pickle is read in a child process that executes nothing of it. Gene names, classes and size factors are read
    from the files that the configuration names, if they are in the checkpoint's folder.

    Example: `scldm convert last.ckpt --config config.yaml --out models/dentate`
    """
    with reported():
        from scldm.checkpoints.convert.convert import convert_upstream
        from scldm.checkpoints.upstream.inputs import InputFiles

        given = InputFiles(genes, metadata, size_factors_mu, size_factors_sd, no_size_factors)
        done = convert_upstream(checkpoint, config, out, given=given, genes_seq_len=genes_seq_len, force=force)
        typer.echo(done.report.text())
        typer.echo(f"wrote {done.vae}" + (f" and {done.flow}" if done.flow is not None else ""))


def export(
    model: ModelPlace,
    to: Annotated[
        Target,
        typer.Option("--to", help="upstream: a checkpoint it loads. huggingface: a folder with a card, for a hub."),
    ],
    out: Out,
    flow: FlowFolder = None,
    force: Force = False,
) -> None:
    """Write a model for others: as a checkpoint that upstream scLDM loads, or as a folder with a model card.

    Example: `scldm export models/dentate --to upstream --out exported`
    """
    with reported():
        from scldm.api.folders import find_models
        from scldm.checkpoints.convert.export import export_upstream

        if to is Target.huggingface:
            from scldm.api.hub.pretrained import write_pretrained
            from scldm.api.model import load

            written = write_pretrained(load(model, flow=flow), out.expanduser(), force=force)
            typer.echo(f"wrote {written}: README.md is its card")
            return
        found = find_models(model)
        done = export_upstream(found.vae, flow or found.flow, out, force=force)
        typer.echo(f"wrote {done.folder}: {', '.join(done.files)} (format: {to.value})")
        for note in done.notes:
            typer.echo(f"note: {note}")


def presets(name: Name = None) -> None:
    """Show the named models of the paper and of upstream, or one of them as sections of a job file.

    Example: `scldm presets dentate_gyrus`
    """

    with reported():
        from scldm.api.presets import preset, preset_names

        if name is None:
            width = max(map(len, preset_names()))
            for each in preset_names():
                found = preset(each)
                size = f"{found.vae.parameters:g} M" if found.vae else ""
                typer.echo(f"{each:<{width}}  {size:>7}  {found.about}")
            return
        typer.echo(as_yaml(preset(name)), nl=False)


def as_yaml(found: Preset) -> str:
    """Return the sections `train_vae` and `train_flow`; settings with our default value are left out."""
    import yaml

    sections: dict[str, Any] = {}
    lines = [f"# {found.name}: {found.about}."]
    if found.inferred:
        lines.append(f"# No source states: {'; '.join(found.inferred)}.")
    if found.vae is not None:
        lines.append(
            f"# VAE: {found.vae.n_genes:,} genes, {found.vae.parameters:g} M parameters, {_epochs(found.vae)}."
        )
        sections["train_vae"] = {"model": _choices(found.vae.model), "train": _training(found.vae)}
    if found.flow is not None:
        lines.append(f"# Flow: labels {dict(found.flow.n_classes)}, {_epochs(found.flow)}.")
        train = _training(found.flow)
        if found.flow.ema is not None:
            train["ema"] = _choices(found.flow.ema)
        sections["train_flow"] = {
            "model": _choices(found.flow.model),
            "flow": _choices(found.flow.path),
            "train": train,
        }
    lines.append(
        "# Set train_vae.train.max_steps and train_flow.train.max_steps: epochs x training cells / batch size."
    )
    return "\n".join(lines) + "\n" + yaml.safe_dump(sections, sort_keys=False, default_flow_style=None, width=100)


def _epochs(recipe: Any) -> str:
    return f"{recipe.epochs} epochs" if recipe.epochs else "epochs not known"


def _choices(config: Any) -> dict[str, Any]:
    return config.model_dump(mode="json", exclude_defaults=True)


def _training(recipe: Any) -> dict[str, Any]:
    out: dict[str, Any] = {}
    if recipe.batch_size is not None:
        out["feed"] = {"batch_size": recipe.batch_size}
    if recipe.optimizer is not None:
        out["optimizer"] = _choices(recipe.optimizer)
    return out
