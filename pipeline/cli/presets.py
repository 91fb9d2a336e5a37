"""The command `scldm presets`: named models as settings to paste into a job file."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from pipeline.cli.common import reported

if TYPE_CHECKING:
    from scldm.api.presets import Preset

Name = Annotated[str | None, typer.Argument(metavar="[NAME]", help="A preset; without it, all are listed.")]


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
    """Sections `train_vae` and `train_flow`; settings that are our defaults are left out."""
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
    lines.append("# Set train.max_steps to epochs x training cells / batch size of your data.")
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
