"""Formulas for memory and arithmetic agree with measured steps."""

from __future__ import annotations

import weakref
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from pipeline.config.train import FlowTrainConfig, TrainConfig, VaeTrainConfig
from pipeline.planning.memory import dit_activations, fits, stage_lines, state_bytes, vae_activations
from pipeline.training.throughput import mfu, peak_flops
from scldm.data.batch import CellBatch
from scldm.nn import decoder
from scldm.nn.config import DiTConfig, VAEConfig
from scldm.nn.dit import DiT
from scldm.nn.flops import TRAINING, dit_flops, vae_flops
from scldm.nn.vae import VAE


class LiveBytes(TorchDispatchMode):
    """The most bytes of tensors that were alive at once."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._alive: set[int] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for x in tree_leaves(out):
            if isinstance(x, Tensor) and (key := x.untyped_storage()._cdata) not in self._alive:
                storage = x.untyped_storage()
                self._alive.add(key)
                self.now += storage.nbytes()
                self.peak = max(self.peak, self.now)
                weakref.finalize(storage, self._gone, key, storage.nbytes())
        return out

    def _gone(self, key: int, size: int) -> None:
        self._alive.discard(key)
        self.now -= size


def peak_of_a_step(loss: Callable[[], Tensor], module: nn.Module) -> int:
    """Without the gradients of the parameters, which are state."""
    loss().sum().backward()  # tables that are made once
    module.zero_grad()
    with LiveBytes() as live:
        loss().sum().backward()
    return live.peak - sum(4 * p.numel() for p in module.parameters())


def cells_of(b: int, g: int, s: int) -> CellBatch:
    ids = torch.stack([torch.randperm(g)[:s].sort().values for _ in range(b)])
    counts = torch.randint(1, 5, (b, s)).float()
    offsets = torch.arange(0, b * s + 1, s)
    return CellBatch(offsets, ids.reshape(-1), counts.reshape(-1), counts.sum(1), {}, torch.arange(b), torch.ones(b))


VAES = [
    (32, 1000, 200, {"d_model": 32, "n_layers": 2, "n_latent_tokens": 16}),
    (16, 2000, 400, {"d_model": 128, "n_layers": 2, "n_latent_tokens": 32, "n_heads": 8, "n_heads_cross": 8}),
    (32, 500, 100, {"d_model": 32, "n_layers": 6, "n_latent_tokens": 64}),
]


@pytest.mark.parametrize(("b", "g", "s", "model"), VAES)
def test_the_formula_for_a_step_of_the_vae_is_right_within_a_factor_of_two(monkeypatch, b, g, s, model):
    monkeypatch.setattr(decoder, "folds", lambda **_: False)  # as a GPU runs it
    config, cells = VAEConfig.model_validate(model), cells_of(b, g, s)
    vae = VAE(config, n_genes=g)
    measured = peak_of_a_step(lambda: vae(cells), vae)
    formula = vae_activations(config, VaeTrainConfig(), cells=b, n_genes=g, expressed=s)
    assert 0.5 < formula / measured < 2


@pytest.mark.parametrize(("b", "m", "model"), [(64, 16, {"d_model": 128}), (32, 64, {"d_model": 64, "n_heads": 4})])
def test_the_formula_for_a_step_of_the_flow_is_right_within_a_factor_of_two(b, m, model):
    config = DiTConfig.model_validate(model)
    dit = DiT(config, n_latent_tokens=m, latent_width=16, n_classes={"a": 5})
    x, t, labels = torch.randn(b, m, 16), torch.rand(b), {"a": torch.zeros(b, dtype=torch.long)}
    measured = peak_of_a_step(lambda: dit(x, t, labels).square(), dit)
    formula = dit_activations(config, FlowTrainConfig(), cells=b, n_latent_tokens=m, latent_width=16)
    assert 0.5 < formula / measured < 2


def test_state_is_partitioned_according_to_the_zero_stage():
    for train in (TrainConfig(precision="bf16"), TrainConfig()):  # bf16 keeps all state in fp32
        assert [state_bytes(100, train, 4, stage=s).device for s in (0, 1, 2, 3)] == [1600, 1100, 800, 500]
    offloaded = state_bytes(100, TrainConfig(offload_optimizer="cpu"), 4, stage=2)
    assert (offloaded.device, offloaded.offloaded) == (500, 300)
    assert state_bytes(100, FlowTrainConfig(), 4, stage=0).device == 2000, "the average is whole on every worker"


def test_the_plan_names_the_a100s_that_hold_each_stage():
    assert fits(30e9) == ["A100 40 GB", "A100 80 GB"]
    assert fits(50e9) == ["A100 80 GB"]
    lines = stage_lines(3_000_000_000, TrainConfig(precision="bf16", zero_stage=2), 8, activations=5e9)
    assert [line.split(":")[0].strip() for line in lines] == ["ZeRO 0", "ZeRO 1", "ZeRO 2", "ZeRO 3"]
    assert "fits A100 80 GB" in lines[0]
    assert "fits A100 40 GB, A100 80 GB  <- this job" in lines[2]
    assert "no A100" in stage_lines(10_000_000_000, TrainConfig(), 2, activations=5e9)[0]


def test_the_arithmetic_of_a_forward_pass_is_that_of_its_matrix_products(monkeypatch):
    monkeypatch.setattr(decoder, "folds", lambda **_: False)
    b, g, s = 4, 600, 100
    config, cells = VAEConfig(d_model=64, n_layers=2), cells_of(4, 600, 100)
    vae = VAE(config, n_genes=g)
    with torch.no_grad(), FlopCounterMode(display=False) as counted:
        vae(cells)
    assert vae_flops(config, n_genes=g, expressed=s) * b == pytest.approx(counted.get_total_flops(), rel=0.15)
    dit = DiT(DiTConfig(d_model=64), n_latent_tokens=16, latent_width=16, n_classes={"a": 3})
    with torch.no_grad(), FlopCounterMode(display=False) as counted:
        dit(torch.randn(b, 16, 16), torch.rand(b), {"a": torch.zeros(b, dtype=torch.long)})
    formula = dit_flops(DiTConfig(d_model=64), n_latent_tokens=16, latent_width=16) * b
    assert formula == pytest.approx(counted.get_total_flops(), rel=0.15)


def test_mfu_is_a_share_of_a_peak_that_is_known():
    peak = peak_flops("NVIDIA A100-SXM4-80GB", "bf16")
    assert peak == 312e12
    assert peak_flops("NVIDIA H100 PCIe", "bf16") == 756e12
    assert peak_flops("NVIDIA H100 80GB HBM3", "fp32") == 67e12
    assert mfu(1e9, 1000, peak, workers=2) == pytest.approx(TRAINING * 1e12 / 624e12)
    assert peak_flops(None, "fp32") is None
    assert mfu(1e9, 1000, peak_flops("some other GPU", "bf16"), workers=2) is None
