"""Another number of workers: the same weights to float tolerance, in every ZeRO stage; the same number: bit for bit."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from helpers.training import elastic_toy
from helpers.training.elastic_toy import FIRST_STOP, SECOND_STOP, SETTINGS
from helpers.training.ranks import start

from pipeline.training.checkpoints.manifest import newest

pytestmark = pytest.mark.multiprocess


def launch(folder: Path, phase: str, world_size: int) -> None:
    codes = start(folder, getattr(elastic_toy, phase), world_size)
    assert codes == [0] * world_size, (folder / "log").read_text()[-3000:]


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> tuple[Path, Path]:
    """Two workers, one worker, two workers; and from the same first stop two workers again."""
    bent, same = tmp_path_factory.mktemp("elastic"), tmp_path_factory.mktemp("same") / "copy"
    launch(bent, "first", 2)
    shutil.copytree(bent, same)
    launch(bent, "second", 1)
    for name in SETTINGS:
        position = newest(bent / name / "bent" / "checkpoints")[0].position
        assert (position.step, position.world_size) == (SECOND_STOP, 1)
    launch(bent, "third", 2)
    launch(same, "again", 2)
    return bent, same


def results(folder: Path, name: str, run: str) -> dict[str, list[float]]:
    return json.loads((folder / name / run / "done.json").read_text())


@pytest.mark.row("C8")
@pytest.mark.parametrize("name", [name for name in SETTINGS if "cautious" not in name])
def test_two_workers_then_one_then_two_come_to_the_weights_of_two(folders, name):
    straight, bent = results(folders[0], name, "straight"), results(folders[0], name, "bent")
    atol = 1e-6  # in bf16 too: gradients are added up in fp32
    for what in ("weights", "average", "curve"):
        np.testing.assert_allclose(bent[what], straight[what], rtol=0 if what != "curve" else atol, atol=atol)


@pytest.mark.parametrize("name", SETTINGS)
def test_as_many_workers_as_before_come_to_the_same_weights_bit_for_bit(folders, name):
    oldest = min(p.name for p in (folders[1] / name / "bent" / "checkpoints").glob("step-*"))
    assert oldest.startswith(f"step-{FIRST_STOP:08d}-w2")
    straight, bent = results(folders[1], name, "straight"), results(folders[1], name, "bent")
    assert bent["weights"] == straight["weights"]
    assert bent["average"] == straight["average"]
