"""A small model exported in upstream's format, for tests that damage it and convert it back."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from click.testing import Result
from torch import Tensor
from typer.testing import CliRunner

from helpers.models.small_models import write_flow, write_vae
from pipeline.cli.app import app
from scldm.checkpoints.convert import convert
from scldm.checkpoints.convert.export import export_upstream
from scldm.checkpoints.untrusted.reader import ForeignCheckpoint


def run(checkpoint: Path, config: Path, out: Path, *options: object) -> Result:
    command = ["convert", checkpoint, "--config", config, "--out", out, *options]
    return CliRunner().invoke(app, [str(word) for word in command])


@dataclass
class Exported:
    """The exported folder, and where its conversion goes."""

    folder: Path
    out: Path

    @property
    def checkpoint(self) -> Path:
        return self.folder / "model.ckpt"

    @property
    def config(self) -> Path:
        return self.folder / "config.yaml"

    def change_state(self, change: Callable[[dict[str, Tensor]], Any]) -> None:
        whole = torch.load(self.checkpoint, weights_only=True)
        change(whole["state_dict"])
        torch.save(whole, self.checkpoint)

    def set(self, at: str, value: Any) -> None:
        """Change a setting by its dotted path."""
        config = yaml.safe_load(self.config.read_text())
        *parents, last = at.split(".")
        node = config
        for name in parents:
            node = node[name]
        node[last] = value
        self.config.write_text(yaml.safe_dump(config))

    def save_vocabulary(self, **vocabulary: Any) -> None:
        """As Lightning saves the data module's encoder inside a checkpoint."""
        whole = torch.load(self.checkpoint, weights_only=True)
        whole["datamodule_hyper_parameters"] = {"vocabulary_encoder": vocabulary}
        torch.save(whole, self.checkpoint)

    def run(self, *options: object) -> Result:
        return run(self.checkpoint, self.config, self.out, *options)

    def refused(self, *words: str, options: tuple[object, ...] = ()) -> str:
        """Convert; it must be bad input, say all the words and leave nothing behind."""
        result = self.run(*options)
        assert result.exit_code == 2, result.output
        for word in words:
            assert word in result.output
        assert sorted(p.name for p in self.out.parent.iterdir()) == ["upstream"]
        return result.output


def new_export(folder: Path, monkeypatch: Any) -> Exported:
    """A fresh one; its checkpoint is our own, and read in this process."""

    def read(path: Path) -> ForeignCheckpoint:
        whole = torch.load(path, weights_only=True)
        return ForeignCheckpoint(whole.pop("state_dict"), whole, {}, ())

    monkeypatch.setattr(convert, "read_checkpoint", read)
    vae, flow = write_vae(folder / "models" / "vae"), write_flow(folder / "models" / "flow", label_dropout=0.8)
    made = Exported(folder / "work" / "upstream", folder / "work" / "out")
    export_upstream(vae, flow, made.folder)
    return made
