"""Small models compute several tiles at once, each on one thread: the numbers of one thread, whatever was set."""

from __future__ import annotations

import threading
import time

import numpy as np
import pytest
import torch
from helpers.models.small_models import CELL_TYPES, DONORS, write_flow, write_vae
from helpers.stages.cell_stages import real_cells
from torch import nn

import scldm
from scldm.generation import tile_threads
from scldm.generation.tile_threads import each_tile

SMALL = (nn.Linear(2, 2),)


@pytest.fixture
def three_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    root = tmp_path_factory.mktemp("models")
    write_vae(root / "vae", CELL_TYPES, DONORS, genes_seq_len=None)
    write_flow(root / "flow", CELL_TYPES, DONORS)
    return scldm.load(root)


def everything(model, adata):
    made = [
        model.generate({"cell_type": "B"}, n=100, seed=1),
        model.encode(adata.copy()),
        model.reconstruct(adata, seed=1),
        model.perturb(adata, {"cell_type": "NK"}, seed=1),
    ]
    numbers = [x.obsm["X_scldm"] for x in made] + [made[i].X.toarray() for i in (0, 2, 3)]
    return [*numbers, model.log_likelihood(adata, flow=True).to_numpy()]


def test_no_number_depends_on_the_threads_of_torch(model, three_threads):
    adata = real_cells()
    several = everything(model, adata)
    torch.set_num_threads(1)
    for one, other in zip(everything(model, adata), several, strict=True):
        np.testing.assert_array_equal(one, other)


def test_tiles_run_at_once_and_come_in_order(three_threads):
    together = threading.Barrier(3, timeout=20)

    def work(tile):
        assert torch.get_num_threads() == 1
        if tile < 3:
            together.wait()  # passes only if three tiles run at the same time
        time.sleep(0.01 * (tile % 2))
        return tile

    assert list(each_tile(work, range(8), SMALL)) == list(range(8))
    assert torch.get_num_threads() == 3, "what was set is set again"


def test_networks_worth_all_threads_compute_a_tile_after_the_other(three_threads, monkeypatch):
    monkeypatch.setattr(tile_threads, "SMALL", 5)
    main = threading.current_thread()
    seen = list(each_tile(lambda _: (threading.current_thread() is main, torch.get_num_threads()), range(3), SMALL))
    assert seen == [(True, 3)] * 3


def test_one_tile_needs_no_other_thread(three_threads):
    main = threading.current_thread()
    assert list(each_tile(lambda _: threading.current_thread() is main, range(1), SMALL)) == [True]


def test_an_error_in_a_tile_reaches_the_caller(three_threads):
    def work(tile):
        if tile == 2:
            raise FloatingPointError("no finite means")
        return tile

    with pytest.raises(FloatingPointError, match="no finite means"):
        list(each_tile(work, range(100), SMALL))
    assert torch.get_num_threads() == 3


def test_no_tile_is_no_result(three_threads):
    assert list(each_tile(lambda tile: tile, [], SMALL)) == []
