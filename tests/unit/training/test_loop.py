"""The loop takes policies as callbacks: one that it has never heard of is added from outside."""

from __future__ import annotations

import json

import pytest
from helpers.training import watched_toy
from helpers.training.ranks import start
from helpers.training.watched_toy import LAST, REFUSED


@pytest.fixture(scope="module")
def done(tmp_path_factory) -> dict:
    folder = tmp_path_factory.mktemp("watched")
    assert start(folder, watched_toy.work, 1) == [0], (folder / "log").read_text()[-3000:]
    return json.loads((folder / "done.json").read_text())


def test_a_callback_from_outside_sees_every_hook_in_order(done):
    plain = ["exchange", "updated"]
    expected = ["train start after 0"]
    for step in range(1, LAST + 1):
        expected.append(f"step start after {step - 1}")
        expected += ["exchange", "skipped"] if step == REFUSED else plain
        expected += ["validated 1"] if step == 5 else []
        expected += [f"saved {step}"] if step in (REFUSED + 1, LAST) else []
    assert done["hooks"] == [*expected, "train end"]


def test_it_steers_the_loop_through_requests(done):
    assert done["steps"] == LAST, "it finished the run before max_steps"


def test_its_metrics_are_logged_and_its_state_comes_back_from_a_checkpoint(done):
    assert done["restored"] == [LAST]
    assert [row["step"] for row in done["rows"]] == [5]


def test_a_step_with_fewer_micro_batches_than_the_engine_accumulates_is_an_error(tmp_path):
    assert start(tmp_path, watched_toy.lose_a_micro_batch, 1) == [0], (tmp_path / "log").read_text()[-3000:]
    error = (tmp_path / "error").read_text()
    assert "step 1 has 3 micro batches" in error
    assert "accumulates 4" in error


def test_scores_of_generated_cells_are_logged_with_their_own_validation_only(tmp_path):
    assert start(tmp_path, watched_toy.score_samples, 1) == [0], (tmp_path / "log").read_text()[-3000:]
    rows = json.loads((tmp_path / "done.json").read_text())
    assert [(row["step"], row.get("val/gen_w2"), row["val/loss"]) for row in rows] == [
        (2, 1, 1),
        (4, None, 1),
        (6, 3, 1),
    ]
