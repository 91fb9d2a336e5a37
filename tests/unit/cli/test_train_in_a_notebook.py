"""`scldm.train` checks its arguments before anything is read, and Ctrl-C ends a training with a checkpoint."""

from __future__ import annotations

import os
import signal

import anndata
import numpy as np
import pytest

import scldm
from pipeline.cli.notebook import STOPPED, _interruptible, _overrides, train
from scldm.errors import InputError


def test_scldm_finds_the_function_of_the_pipeline():
    assert scldm.train is train


def test_all_wrong_arguments_are_said_at_once(tmp_path):
    cells = anndata.AnnData(np.ones((2, 2), np.float32))
    with pytest.raises(InputError) as error:
        train(cells, labels=["a", 3], name="no/name", output=tmp_path, gpus=-1, seed=1.5)
    said = str(error.value)
    for part in (
        "gpus must be",
        "seed must be",
        "name is that of a folder",
        "labels must be names of obs columns; got 3",
    ):
        assert part in said
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("given", [{"ray_address": "127.0.0.1:6379"}, {}])
def test_no_ray_and_a_cluster_contradict_each_other(tmp_path, monkeypatch, given):
    if not given:
        monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:6379")
    with pytest.raises(InputError, match="ray=False trains on this machine alone"):
        train(anndata.AnnData(np.ones((2, 2), np.float32)), output=tmp_path, ray=False, **given)


def test_settings_are_a_dictionary_or_the_texts_of_the_command_line():
    given = {"train_vae.train.max_steps": np.int64(5), "ingest.cells": {"tissue": ["lung"]}, "a": None, "b": "x: y"}
    assert _overrides(given) == ["train_vae.train.max_steps=5", "ingest.cells={tissue: [lung]}", "a=null", "b='x: y'"]
    assert _overrides(["a.b=c"]) == ["a.b=c"]
    assert _overrides(None) == []
    with pytest.raises(InputError, match="settings must be"):
        _overrides("a.b=c")


def test_ctrl_c_asks_a_training_to_stop_with_a_checkpoint():
    asked = []
    before = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)

    def interrupted_training() -> None:
        signal.signal(signal.SIGTERM, lambda number, frame: asked.append(number))  # as a training does
        os.kill(os.getpid(), signal.SIGINT)
        assert asked == [signal.SIGTERM]
        raise SystemExit(STOPPED)  # as a training ends

    try:
        with pytest.raises(KeyboardInterrupt, match="the same call goes on from there"), _interruptible():
            interrupted_training()
        assert signal.getsignal(signal.SIGINT) is before[1]
    finally:
        signal.signal(signal.SIGTERM, before[0])


def test_ctrl_c_outside_of_a_training_is_what_it_always_is():
    with pytest.raises(KeyboardInterrupt), _interruptible():
        os.kill(os.getpid(), signal.SIGINT)


def test_another_exit_is_passed_on():
    with pytest.raises(SystemExit, match="3"), _interruptible():
        raise SystemExit(3)
