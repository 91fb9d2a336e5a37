"""Read what is recorded beside a model about its making: the bullets of its card, and the newest scores of its cells.

A card (README.md of a model folder) states one fact a line, `* name: value`. Scores are in the evaluations of the
pipeline that trained the model, or in evaluation.json, which a published folder carries. What is not recorded is
unknown; nothing here is guessed.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from scldm.api.folders import MANIFEST, ModelFolders
from scldm.text import plain_line

EVALUATION = "evaluation.json"  # in a published folder, beside vae/ and flow/
CARD = "README.md"


@dataclass(frozen=True)
class RecordedScores:
    """Scores of cells that a flow made, against held-out real cells."""

    version: str  # of the evaluation
    split: str
    protocol: str
    flow: str  # digest of the flow's folder
    scores: Mapping[str, float]
    floor: Mapping[str, float] = field(default_factory=dict)  # the same scores of real cells against real cells
    verdict: str = ""

    def as_json(self) -> str:
        """Return it as the text of evaluation.json."""
        return json.dumps(asdict(self), indent=1)


def card_facts(folder: Path) -> list[str]:
    """Return the facts of a model folder's card, each `name: value` in one line; none if it has no card."""
    card = folder / CARD
    if not card.is_file():
        return []
    lines = card.read_text(errors="replace").splitlines()
    return [plain_line(line.removeprefix("* ")) for line in lines if line.startswith("* ")]


def inherited_facts(name: str, folder: Path) -> list[str]:
    """Return what a model that another one was made from says of itself, under its name."""
    facts = [f for f in card_facts(folder) if not f.startswith("input ")]
    shown = plain_line(name)
    return [f"{shown}: {fact}" for fact in facts] or [
        f"{shown}: what it was trained on is not known: its card does not say"
    ]


def recorded_scores(folders: ModelFolders) -> RecordedScores | None:
    """Return the newest scores of the cells of a flow, or None if there are none."""
    from scldm.checkpoints.native import folder_digest

    if folders.flow is None:
        return None
    digest = folder_digest(folders.flow)
    stage = folders.flow.parent  # <pipeline>/{train_flow,distil}/<version>/model
    found = [(m["finished_at"], m) for m in evaluations(stage)]
    if found:
        newest = max(found, key=lambda pair: pair[0])[1]
        facts, config = newest["facts"], newest["config"]
        return RecordedScores(
            version=str(newest["version"]), split=str(config.get("split")), protocol=str(config.get("protocol")),
            flow=digest, scores=facts["metrics"], floor=facts.get("floor", {}), verdict=str(facts.get("verdict", "")),
        )  # fmt: skip
    published = _json(stage / EVALUATION)
    try:
        scores = RecordedScores(**published)
    except TypeError:
        return None
    return scores if scores.flow == digest else None  # those of another flow would be a lie


def evaluations(stage: Path) -> Iterator[dict[str, Any]]:
    """Yield the manifests of the evaluations of cells that the models of a train_flow or a distil made."""
    made_by = _json(stage / MANIFEST).get("stage")
    if made_by not in ("train_flow", "distil"):
        return
    pipeline = stage.parent.parent
    for path in pipeline.glob(f"evaluate/*/{MANIFEST}"):
        manifest = _json(path)
        version = manifest.get("inputs", {}).get("generate")
        generate = _json(pipeline / "generate" / str(version) / MANIFEST)
        if generate.get("inputs", {}).get(made_by) == stage.name and "metrics" in manifest.get("facts", {}):
            yield manifest


def _json(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}
