"""A job on real cells is killed at every point of a shard's commit; the same command again gives the same cells."""

from __future__ import annotations

import multiprocessing
import os
import signal
from pathlib import Path

import pandas as pd
import pytest
from helpers.stages.cell_stages import models, run_stage, write_soma

import scldm
from pipeline.core.faults import VARIABLE

pytestmark = pytest.mark.chaos

POINTS = ["cells.before_rename:n=2:kill", "cells.before_record:n=2:kill", "cells.before_manifest:kill"]


def run(folder: Path, settings: dict, fault: str) -> None:
    os.environ[VARIABLE] = fault
    run_stage("reconstruct", folder, settings)


@pytest.mark.row("G2")
def test_killed_at_any_point_the_same_command_gives_the_same_cells(tmp_path):
    settings = {"source": write_soma(tmp_path / "soma"), "model": {"vae": models(tmp_path)["vae"]}, "shard_size": 20}
    whole = scldm.open_cells(run_stage("reconstruct", tmp_path / "whole", settings))[:]
    for fault in POINTS:
        folder = tmp_path / fault.split(":")[0]
        process = multiprocessing.get_context("spawn").Process(target=run, args=(folder, settings, fault))
        process.start()
        process.join(180)
        assert process.exitcode == -signal.SIGKILL, fault
        assert not (folder / "manifest.json").exists()
        again = scldm.open_cells(run_stage("reconstruct", folder, settings))[:]
        pd.testing.assert_frame_equal(again.obs, whole.obs)
        assert (again.X != whole.X).nnz == 0
        assert not list((folder / "cells").glob(".*"))
