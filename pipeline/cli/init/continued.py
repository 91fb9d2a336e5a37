"""What a new job trains on from: a model that gives the weights of its VAE and flow, and the genes of the cells."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from pipeline.cli.init.defaults import Choices, Chosen
from scldm.api.arguments import Arguments
from scldm.api.folders import find_models

KEYS = ("model", "flow", "keep_vae", "lora", "freeze")


@dataclass(frozen=True)
class Continued:
    """A model that is trained on."""

    vae: Path  # model folder
    flow: Path | None  # model folder; None: the flow is new
    keep_vae: bool = False  # the VAE is used as it is
    lora: int | None = None  # rank of adapters that are trained in place of all weights
    freeze: Sequence[str] = ()  # beginnings of names of the VAE's parameters that stay as they are

    @property
    def genes(self) -> dict[str, Any]:
        """Return ingest.genes."""
        return {"vocabulary": str(self.vae)}

    @property
    def vae_start(self) -> dict[str, Any]:
        """Return train_vae.start_from."""
        return self._start(self.vae) | ({"freeze": list(self.freeze)} if self.freeze else {})

    @property
    def flow_start(self) -> dict[str, Any] | None:
        """Return train_flow.start_from; None for a new flow."""
        return None if self.flow is None else self._start(self.flow)

    def described(self, choices: Choices) -> Choices:
        """Return choices as the summary shows them: genes and sizes are those of the model."""
        vae_is = "used as it is" if self.keep_vae else f"sizes and first weights of {self.vae}"
        found = replace(
            choices,
            min_cells=Chosen("the model's genes", f"of {self.vae}"),
            vae=Chosen({"d_model": _width(self.vae)}, vae_is),
        )
        if self.keep_vae:
            found = replace(found, vae_train=replace(choices.vae_train, reason="none: it is not trained"))
        if self.flow is None:
            return found
        return replace(found, flow=Chosen({"d_model": _width(self.flow)}, f"sizes and first weights of {self.flow}"))

    def _start(self, folder: Path) -> dict[str, Any]:
        return {"model": str(folder)} | ({} if self.lora is None else {"lora": {"rank": self.lora}})


def _width(folder: Path) -> int:
    return int(json.loads((folder / "config.json").read_text())["config"]["d_model"])


def read_start(start_from: Any) -> Continued | None:
    """Return what a job trains on from.

    Args:
        start_from: A model's name or folder; {"model": …, "flow": its flow if elsewhere, "keep_vae": True, "lora": 8,
            "freeze": ["encoder"]}; or None.

    Raises:
        ArgumentError: It cannot be used; all that is wrong is said.
        CheckpointError: No model is there.
    """
    if start_from is None:
        return None
    given = Arguments()
    chosen = dict(start_from) if isinstance(start_from, Mapping) else {"model": start_from}
    if unknown := [str(key) for key in chosen if key not in KEYS]:
        given.problems.append(f"start_from has no {', '.join(unknown)}; it has {', '.join(KEYS)}")
    given.path("start_from", chosen.get("model"))
    if chosen.get("flow") is not None:
        given.path("start_from: flow", chosen["flow"])
    keep = given.flag("keep_vae", chosen.get("keep_vae", False))
    lora = None if chosen.get("lora") is None else given.whole("lora", chosen["lora"], least=1)
    freeze = chosen.get("freeze") or ()
    freeze = [freeze] if isinstance(freeze, str) else freeze
    if not isinstance(freeze, Sequence) or not all(isinstance(x, str) for x in freeze):
        given.problems.append(f"freeze must be beginnings of names of the VAE's parameters; got {freeze!r}")
    elif freeze and (keep or lora is not None):
        given.problems.append(
            "freeze says nothing more beside keep_vae or lora, which keep the VAE's weights; leave it out"
        )
    given.raise_problems()
    found = find_models(chosen["model"])
    flow = found.flow if chosen.get("flow") is None else Path(chosen["flow"]).expanduser()
    return Continued(found.vae.absolute(), flow and flow.absolute(), keep, lora, tuple(freeze))
