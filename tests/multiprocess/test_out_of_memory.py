"""A worker that runs out of memory: which one, in which step, and the settings that fix it; then the same run."""

from __future__ import annotations

import re

import pytest
from helpers.training.ranks import start, starved
from helpers.training.small_job import ingest_small, spec_of

from pipeline.config.train import FlowTrainConfig, VaeTrainConfig
from pipeline.data.loading.blocks import NoRoom
from pipeline.training.out_of_memory import advice, explain_out_of_memory, is_out_of_memory

pytestmark = pytest.mark.multiprocess
WIDE = {"d_model": 128, "n_layers": 2, "n_heads": 4, "n_heads_cross": 4, "n_latent_tokens": 128}


@pytest.mark.row("T12")
def test_T12_a_worker_out_of_memory_names_settings_and_they_fix_it(tmp_path, record):
    spec = spec_of(tmp_path, ingest_small(tmp_path / "ingest"), max_steps=1, theta_cells=0)
    spec["config"]["model"] |= WIDE
    spec["config"]["train"]["feed"] |= {"batch_size": 256, "micro_batch_size": 128}
    codes = start(tmp_path, starved, 2, spec=spec)
    log = (tmp_path / "log").read_text()
    assert 0 not in codes
    assert "ran out of memory in step 1: " in log, log[-3000:]
    assert not list((tmp_path / "checkpoints").glob("step-*"))
    while codes != [0, 0]:  # follow the advice until it fits
        pattern = r"A worker computes (\d+) cells at a time. Set train.feed.micro_batch_size=(\d+),"
        advised = re.findall(pattern, log)[-1]
        assert int(advised[1]) == int(advised[0]) // 2, log[-3000:]
        spec["config"]["train"]["feed"]["micro_batch_size"] = int(advised[1])
        codes = start(tmp_path, starved, 2, spec=spec)
        log = (tmp_path / "log").read_text()
    record["lost_steps"] = 0


ON_A_GPU = ("train.zero_stage=2", "train.offload_optimizer=cpu", "train.precision=bf16")


def test_the_advice_is_valid_not_yet_set_and_about_the_memory_that_ran_out():
    what = "worker 1 ran out of memory in step 7"
    message = advice(VaeTrainConfig(), 32, what, "CUDA out of memory. Tried to allocate 2 GiB\nand more", on_gpu=True)
    assert message.startswith(
        f"{what}: CUDA out of memory. Tried to allocate 2 GiB. A worker computes 32 cells at a time. Set"
    )
    assert "train.feed.micro_batch_size=16, or" in message
    assert all(setting in message for setting in (*ON_A_GPU, "train.genes_per_step=2000"))
    message = advice(VaeTrainConfig(), 1, what, "DefaultCPUAllocator: can't allocate memory", on_gpu=False)
    assert not any(setting in message for setting in (*ON_A_GPU, "micro_batch_size")), "they use the host's memory"
    sampled = FlowTrainConfig(zero_stage=2, sample_every=1, offload_optimizer="cpu", precision="bf16")
    assert "zero_stage" not in advice(sampled, 8, what, "", on_gpu=True), "stage 3 cannot be sampled from"


def test_a_full_object_store_is_logged_by_its_worker_and_raised_unchanged(monkeypatch, caplog):
    monkeypatch.setattr("pipeline.training.out_of_memory.dist.get_rank", lambda: 3)
    with pytest.raises(NoRoom, match="set less"), explain_out_of_memory(VaeTrainConfig(), 32, "in step 7"):
        raise NoRoom("no room in Ray's object store memory; set less")
    assert caplog.messages == ["worker 3: no room in Ray's object store memory; set less"]


def test_other_errors_are_not_changed():
    assert is_out_of_memory(MemoryError())
    assert is_out_of_memory(RuntimeError("[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: can't allocate memory"))
    assert not is_out_of_memory(RuntimeError("shapes do not match"))
