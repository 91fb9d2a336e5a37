"""A row of the table of scores: generated cells, their floor and the baselines."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from scldm.metrics.score import Judgement, Score, at_floor, judge


@dataclass(frozen=True)
class MetricRow:
    """One score of all candidates."""

    name: str
    score: Score
    floor: Score | None = None
    baselines: Mapping[str, Score] = field(default_factory=dict)  # and other candidates, by name

    @property
    def all(self) -> dict[str, Score]:
        """All scores of the row, in the order of the columns."""
        floor = {} if self.floor is None else {"floor": self.floor}
        return {"generated": self.score, **floor, **self.baselines}

    def against(self, name: str) -> Judgement | None:
        """Judge whether generated cells are nearer to the floor than a baseline; None if either is missing."""
        other = self.baselines.get(name)
        return None if other is None or self.floor is None else judge(self.score, other, self.floor)

    @property
    def at_floor(self) -> bool | None:
        """Whether generated cells are indistinguishable from the floor; None if that has no interval."""
        return None if self.floor is None else at_floor(self.score, self.floor)

    @property
    def hint(self) -> str:
        """Which values are good, as a short text with an arrow."""
        ideal = f"{self.score.ideal:g}"
        return {"lower": "↓ lower", "higher": "↑ higher", "ideal": f"→ near {ideal}"}[self.score.better]
