"""Compiled blocks compute what the plain ones do; the code that a compiler makes of them is for tests/gpu."""

from __future__ import annotations

import pytest
import torch

from pipeline.config.train import TrainConfig, VaeTrainConfig
from pipeline.training.engine import compiled_blocks
from pipeline.training.engine.compiled_blocks import compile_blocks
from scldm.data.batch import CellBatch
from scldm.errors import InputError
from scldm.nn.config import DiTConfig, VAEConfig
from scldm.nn.dit import DiT
from scldm.nn.vae import VAE

SIZES = {"d_model": 64, "n_layers": 1, "n_heads": 2, "n_heads_cross": 2, "n_latent_tokens": 4, "latent_width": 6}


def vae() -> VAE:
    torch.manual_seed(0)
    return VAE(VAEConfig(**SIZES), n_genes=700)  # two tiles, the second smaller


def gradients(module, loss) -> dict[str, torch.Tensor]:
    loss.sum().backward()
    return {name: p.grad for name, p in module.named_parameters() if p.grad is not None}


def test_a_compiled_vae_has_the_same_names_losses_and_gradients():
    cells = CellBatch.from_dense(torch.poisson(torch.rand(3, 700, generator=torch.Generator().manual_seed(0))))
    plain, compiled = vae(), vae()
    traced = []
    tile = compiled.decoder.decode_tile
    compiled.decoder.decode_tile = lambda *args: (traced.append(torch.compiler.is_compiling()), tile(*args))[1]
    compile_blocks(compiled, backend="eager")
    assert list(compiled.state_dict()) == list(plain.state_dict())
    one, other = (gradients(v, v(cells)) for v in (plain, compiled))
    assert one.keys() == other.keys()
    for name, grad in one.items():
        torch.testing.assert_close(other[name], grad, msg=name)
    assert True in traced, "the tiles went through the compiler"


def test_a_compiled_dit_has_the_same_losses_and_gradients():
    found = []
    for compiled in (False, True):
        torch.manual_seed(0)
        dit = DiT(DiTConfig(d_model=32, n_layers=2), n_latent_tokens=4, latent_width=6, n_classes={"a": 3})
        if compiled:
            compile_blocks(dit, backend="eager")
        x = torch.randn(5, 4, 6, generator=torch.Generator().manual_seed(1))
        found.append(gradients(dit, dit(x, torch.linspace(0, 1, 5), {"a": torch.arange(5) % 3}).square()))
    for name, grad in found[0].items():
        torch.testing.assert_close(found[1][name], grad, msg=name)


def test_a_worker_without_a_compiler_says_so_before_it_trains(monkeypatch):
    monkeypatch.setattr(compiled_blocks.shutil, "which", lambda name: None)
    with pytest.raises(InputError, match=r"train\.compile \(true\) needs a C\+\+ compiler on every worker"):
        compile_blocks(vae())


def test_compilation_and_gathered_weights_are_refused_together():
    with pytest.raises(ValueError, match=r"compile \(true\) cannot look into zero_stage 3"):
        TrainConfig(compile=True, zero_stage=3)


def test_what_is_left_at_its_default_is_not_written_down():
    assert {"compile", "first_weights"}.isdisjoint(VaeTrainConfig().model_dump())
    assert VaeTrainConfig(compile=True).model_dump()["compile"] is True
