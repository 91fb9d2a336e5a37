"""A worker that has too little memory: which one, in which step, and the settings that mend it; then the same run."""

from __future__ import annotations

import pytest
from ranks import start, starved
from small_job import ingest_small, spec_of

from pipeline.train_config import TrainConfig, VaeTrainConfig
from pipeline.training.room import advice, is_of_memory

pytestmark = pytest.mark.multiprocess
WIDE = {"d_model": 128, "n_layers": 2, "n_heads": 4, "n_heads_cross": 4, "n_latent_tokens": 128}


@pytest.mark.row("T12")
def test_T12_a_worker_without_memory_says_which_settings_take_it_and_they_do(tmp_path, record):
    spec = spec_of(tmp_path, ingest_small(tmp_path / "ingest"), max_steps=1, theta_cells=0)
    spec["config"]["model"] |= WIDE
    spec["config"]["train"]["feed"] |= {"batch_size": 256, "micro_batch_size": 128}
    codes = start(tmp_path, starved, 2, spec=spec)
    said = (tmp_path / "log").read_text()
    assert 0 not in codes
    assert "ran out of memory in step 1: " in said, said[-3000:]
    assert "train.feed.micro_batch_size=64 (now 128; the global batch stays as it is)" in said
    assert not list((tmp_path / "checkpoints").glob("step-*"))
    spec["config"]["train"]["feed"]["micro_batch_size"] = 4  # what was said, several times over
    assert start(tmp_path, starved, 2, spec=spec) == [0, 0], (tmp_path / "log").read_text()[-3000:]
    record |= {"exit_code": 1, "lost_steps": 0}


def test_what_is_advised_is_what_is_not_yet_set():
    said = advice(VaeTrainConfig(), 7, 1, "CUDA out of memory. Tried to allocate 2 GiB\nand more")
    assert said.startswith("worker 1 ran out of memory in step 7: CUDA out of memory. Tried to allocate 2 GiB. Set")
    for setting in ("micro_batch_size=32", "zero_stage=2", "offload_optimizer=cpu", "precision=bf16", "genes_per_step"):
        assert f"train.{setting}" in said or f"train.feed.{setting}" in said
    lean = TrainConfig(zero_stage=3, offload_optimizer="cpu", precision="bf16")
    said = advice(lean, 7, 1, "")
    assert not any(f"train.{x}" in said for x in ("zero_stage", "offload_optimizer", "precision", "genes_per_step"))


def test_other_errors_are_left_as_they_are():
    assert is_of_memory(MemoryError())
    assert is_of_memory(RuntimeError("[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: can't allocate memory"))
    assert not is_of_memory(RuntimeError("shapes do not match"))
