"""Pipelines are compared by the distance of their scores to their own floors."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from pipeline.cli.app import app
from pipeline.core.manifest import Manifest, write_manifest
from pipeline.tracking.comparison.compare import ComparedRun, compare, departure
from pipeline.tracking.comparison.records import Measured, from_folder
from pipeline.tracking.comparison.text import as_text
from scldm.errors import InputError
from scldm.metrics import score as scores

SCORES = {"w2": ("lower", 0.0), "auroc": ("ideal", 0.5), "label_recall.cell_type.B cell": ("higher", 1.0)}


def stage(root: Path, name: str, version: str, inputs: dict, *, config: dict | None = None, at: float = 1.0, **facts):
    folder = root / name / version
    folder.mkdir(parents=True)
    write_manifest(Manifest(name, version, str(folder), config or {}, inputs, facts, 2.0, at))
    return folder


def pipeline(
    root: Path, *, layers: int, scores: dict[str, tuple[float, float]], digest: str = "d1", seed: str = ""
) -> Path:
    """A finished pipeline whose scores are name -> (value, floor)."""
    i, v, f, g, e = (f"{x}{seed}0" for x in "ivfge")
    stage(root, "ingest", i, {}, digest=digest, census_version="2025-01-30")
    stage(root, "train_vae", v, {"ingest": i}, metrics={"val/loss": 300.0}, n_parameters=1_000_000)
    flow = {"model": {"n_layers": layers}, "train": {"max_steps": 5}}
    stage(root, "train_flow", f, {"ingest": i, "train_vae": v}, config=flow, metrics={"val/loss": 0.3})
    stage(root, "generate", g, {"ingest": i, "train_vae": v, "train_flow": f})
    folder = stage(root, "evaluate", e, {"ingest": i, "train_vae": v, "generate": g}, at=layers)
    rows = [
        {"metric": k, "better": SCORES[k][0], "ideal": SCORES[k][1], "generated": value, "floor": floor}
        for k, (value, floor) in scores.items()
    ]
    (folder / "metrics.json").write_text(json.dumps({"rows": rows}))
    return root


@pytest.fixture
def two(tmp_path) -> list[Path]:
    a = pipeline(tmp_path / "a", layers=4, scores={"w2": (2.0, 1.0), "auroc": (0.7, 0.5)})
    b = pipeline(tmp_path / "b", layers=8, scores={"w2": (0.5, 1.0), "auroc": (0.9, 0.5)}, seed="x")
    return [a, b]


def sides(folders: list[Path]) -> list[ComparedRun]:
    return [ComparedRun(str(f), from_folder(f)) for f in folders]


def test_the_best_is_the_nearest_to_its_floor_not_the_lowest(two):
    rows = {r.name: r for r in compare(sides(two)).metrics}
    assert rows["w2"].values == [2.0, 0.5]
    assert rows["w2"].best == [1]  # 0.5 below the floor is nearer than 1 above it
    assert rows["auroc"].best == [0]
    below = compare(sides([two[0], pipeline(two[0].parent / "c", layers=4, scores={"w2": (-1.5, 1.0)})]))
    assert below.metrics[0].best == [0]  # farther below the floor than the other is above


def test_sides_with_other_floors_are_judged_by_their_own(tmp_path):
    a = pipeline(tmp_path / "a", layers=4, scores={"w2": (2.0, 1.9)}, digest="d1")
    b = pipeline(tmp_path / "b", layers=4, scores={"w2": (1.0, 0.5)}, digest="d2")
    found = compare(sides([a, b]))
    assert found.metrics[0].best == [0]
    assert "data_digest differs" in found.notes[0]
    assert "floor A" in as_text(found)
    assert "floor B" in as_text(found)


def test_a_departure_is_that_of_the_metrics(two):
    for value, floor in ((2.0, 1.0), (0.25, 1.0), (1.0, 1.0)):
        ours = departure(Measured(value, floor))
        one, other = (scores.Score(x, "lower", 0.0, "distance", "") for x in (value, floor))
        assert ours == scores.departure(one, other)
    assert departure(Measured(1.0)) is None
    assert departure(None) is None


def test_only_settings_that_differ_are_shown_with_their_stage(two):
    found = compare(sides(two))
    assert found.params == {"train_flow.model.n_layers": ["4", "8"]}
    assert found.lineage["data_digest"] == ["d1", "d1"]
    assert found.lineage["train_flow"] == ["f0", "fx0"]
    assert found.notes == []


def test_a_stage_is_shown_with_the_evaluation_that_was_made_from_it(tmp_path):
    root = pipeline(tmp_path / "a", layers=4, scores={"w2": (2.0, 1.0)})
    pipeline(root, layers=8, scores={"w2": (1.5, 1.0)}, seed="y")
    older, newer = from_folder(root / "train_flow" / "f0"), from_folder(root / "train_flow" / "fy0")
    assert [r.version for r in older if r.stage == "evaluate"] == ["e0"]
    assert [r.version for r in newer if r.stage == "evaluate"] == ["ey0"]
    assert [r.version for r in from_folder(root) if r.stage == "evaluate"] == ["ey0"]  # the newest


def test_scores_are_the_key_ones_unless_all_are_requested(tmp_path):
    some = {"w2": (2.0, 1.0), "label_recall.cell_type.B cell": (0.9, 0.95)}
    both = sides([pipeline(tmp_path / x, layers=4, scores=some) for x in "ab"])
    assert [r.name for r in compare(both).metrics] == ["w2"]
    assert [r.name for r in compare(both, every=True).metrics] == list(some)
    assert compare(both).metrics[0].best == [0, 1]  # a tie


def test_a_side_without_an_evaluation_is_noted_and_not_judged(tmp_path, two):
    stage(tmp_path / "c", "ingest", "i0", {}, digest="d1")
    found = compare(sides([two[0], tmp_path / "c"]))
    assert found.metrics[0].values == [2.0, None]
    assert found.metrics[0].best == []
    assert "has no evaluation" in found.notes[0]


def run(*words: object):
    return CliRunner().invoke(app, ["runs", "compare", *map(str, words)])


def test_the_command_prints_tables_with_a_star_and_the_floor(two):
    result = run(*two)
    assert result.exit_code == 0, result.output
    lines = [line.split() for line in result.output.splitlines()]
    assert ["w2", "lower", "1", "2", "0.5", "*"] in lines
    assert ["auroc", "near", "0.5", "0.5", "0.7", "*", "0.9"] in lines
    assert ["train_flow.model.n_layers", "4", "8"] in lines


def test_the_command_prints_json(two):
    found = json.loads(run(*two, "--json").output)
    assert found["params"] == {"train_flow.model.n_layers": ["4", "8"]}
    assert [(r["name"], r["best"]) for r in found["metrics"]] == [("w2", [1]), ("auroc", [0])]


def test_everything_that_cannot_be_compared_is_reported_together(tmp_path, two):
    result = run(two[0], tmp_path / "nothing", tmp_path / "neither")
    assert result.exit_code == 2
    assert str(tmp_path / "nothing") in result.output
    assert str(tmp_path / "neither") in result.output
    assert run(two[0]).exit_code == 2
    with pytest.raises(InputError, match="holds no finished stage"):
        from_folder(tmp_path)
