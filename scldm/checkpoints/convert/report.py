"""Report of the conversion of an upstream checkpoint, for the terminal and for the model card."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from scldm.checkpoints.untrusted.reader import ForeignCheckpoint
from scldm.checkpoints.upstream.layout import UpstreamParts
from scldm.checkpoints.upstream.settings import UpstreamSettings
from scldm.text import shown

_COUNTERS = ("epoch", "global_step", "pytorch-lightning_version")  # kept on the card
_MEANING = {
    "optimizer_states": "optimizer state",
    "lr_schedulers": "state of the learning-rate schedule",
    "loops": "progress of the training loop",
    "callbacks": "state of callbacks",
    "hyper_parameters": "hyper-parameters of the module (the configuration has them)",
    "datamodule_hyper_parameters": "settings of the data module (its vocabulary was read)",
}


@dataclass
class ConversionReport:
    """Facts and notes that are collected while a checkpoint is converted."""

    title: str
    numbers: dict[str, str]
    sources: dict[str, str] = field(default_factory=dict)  # genes, classes, size factors
    left_behind: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    @classmethod
    def begin(
        cls,
        checkpoint: Path,
        config: Path,
        settings: UpstreamSettings,
        foreign: ForeignCheckpoint,
        parts: UpstreamParts,
    ) -> ConversionReport:
        """Start a report with what is known once the state dict has been split."""
        counters = (parts.ema_began is not None) + (parts.ema_step is not None)
        used = {"vae": len(parts.vae), "flow": len(parts.dit), "averaged flow": len(parts.ema), "counters": counters}
        numbers = {
            "checkpoint": checkpoint.name,
            "configuration": config.name,
            **{name: shown(foreign.about[name]) for name in _COUNTERS if name in foreign.about},
            "keys in its state dict": str(len(foreign.state)),
            "keys used": ", ".join(f"{name} {n}" for name, n in used.items() if n),
            "keys equal to a used one": str(len(parts.equal)),
        }
        if parts.ema_step is not None:
            numbers["updates of the average (ema_model.step)"] = str(parts.ema_step)
        left = [
            f"{name}{f' ({n})' if n else ''}: {_MEANING.get(name, 'not part of the model')}"
            for name, n in foreign.left.items()
            if name not in _COUNTERS
        ]
        notes = []
        if parts.ema and parts.ema_began is False:
            notes.append(
                "the average of the weights had not begun (ema_model.initted is false): sample with weights raw"
            )
        kind = {"vae": "VAE", "ldm": "VAE and flow"}[settings.kind]
        return cls(f"{kind} converted from upstream scLDM", numbers, {}, left + settings.left_behind, notes)

    def text(self) -> str:
        """Return the report for the terminal."""
        rows = [*self.numbers.items(), *((f"{k} from", v) for k, v in self.sources.items())]
        width = max(len(name) for name, _ in rows)
        lines = [self.title, *(f"  {name:<{width}}  {value}" for name, value in rows)]
        lines += ["left behind:", *(f"  {item}" for item in self.left_behind)] if self.left_behind else []
        lines += ["note:", *(f"  {item}" for item in self.notes)] if self.notes else []
        return "\n".join(lines)

    def card(self) -> str:
        """Return README.md of the model folders, with file names only: a path would reveal folders of this machine."""
        lines = [f"# {self.title}", "", f"* weights: converted from upstream's {self.numbers['checkpoint']}"]
        lines += [f"* {name}: {value}" for name, value in self.numbers.items()]
        lines += [f"* {name} from: {_file_names(value)}" for name, value in self.sources.items()]
        for heading, items in (("Left behind", self.left_behind), ("Notes", self.notes)):
            if items:
                lines += ["", f"## {heading}", "", *(f"- {item}" for item in items)]
        lines += [
            "",
            "## Library sizes",
            "",
            "Mean and standard deviation of log(library size) per class. Upstream has no entry for all cells: `all` is",
            "the mixture, in equal parts, of the classes (or of their combinations); numbers of cells are not known.",
            "",
        ]
        return "\n".join(lines)


def _file_names(source: str) -> str:
    return ", ".join(Path(part).name if "/" in part else part for part in source.split(", "))
