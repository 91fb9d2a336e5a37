"""Upstream's checkpoints become model folders that load; mismatched weights are named, and nothing is written."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.models.exported_model import Exported, new_export, run
from helpers.models.small_models import write_vae
from helpers.models.upstream_fixtures import FOLDER
from safetensors.torch import load_file, save_file
from torch import Tensor

from scldm.checkpoints.convert.export import export_upstream
from scldm.checkpoints.native import load_flow, load_vae
from scldm.checkpoints.untrusted import child as untrusted_child
from scldm.checkpoints.untrusted import reader as untrusted

CKPT = FOLDER / "ckpt"
recorded = pytest.mark.skipif(not CKPT.is_dir(), reason="upstream's checkpoints are not beside this checkout")
PAIRS = [
    ("vae_last", "vae_config"),
    ("vae_compiled_keys", "vae_config"),
    ("ldm_last", "ldm_config"),
    ("ldm_compiled_keys", "ldm_config"),
    ("ldm_legacy_scg_vae_module", "ldm_legacy_config"),
]
EQUAL = {"vae_last": 0, "vae_compiled_keys": 50, "ldm_compiled_keys": 21 + 50 + 21}  # the others: online_model's 21


@pytest.fixture
def exported(tmp_path, monkeypatch) -> Exported:
    return new_export(tmp_path, monkeypatch)


@pytest.fixture
def read_here(monkeypatch):
    """The reader's own code, allow-list and all, in this process: starting another takes seconds."""

    def read(kind: str, path: Path, out: Path, **_: Any) -> dict[str, Any]:
        if kind == "checkpoint":
            untrusted_child.read_checkpoint(str(path), str(out), torch, save_file)
        else:
            untrusted_child.read_plain(str(path), str(out))
        return json.loads((out / "about.json").read_text())

    monkeypatch.setattr(untrusted, "_run", read)


@recorded
def test_a_checkpoint_of_upstreams_goes_through_the_reader_in_its_own_process(tmp_path):
    result = run(CKPT / "ldm_last.ckpt", CKPT / "ldm_config.yaml", tmp_path / "out")
    assert result.exit_code == 0, result.output
    assert result.output.splitlines()[-1] == f"wrote {tmp_path / 'out' / 'vae'} and {tmp_path / 'out' / 'flow'}"


@recorded
@pytest.mark.usefixtures("read_here")
@pytest.mark.parametrize(("name", "config"), PAIRS)
def test_upstreams_own_checkpoints_become_folders_that_load(tmp_path, name, config):
    result = run(CKPT / f"{name}.ckpt", CKPT / f"{config}.yaml", tmp_path / "out")
    assert result.exit_code == 0, result.output
    assert "keys used" in result.output
    assert result.output.split("keys equal to a used one")[1].split()[0] == str(EQUAL.get(name, 21))
    assert "optimizer state" in result.output or "compiled" in name
    vae = load_vae(tmp_path / "out" / "vae")
    assert vae.vocabulary.feature_ids == tuple(f"Gene{i}" for i in range(40))
    assert vae.vocabulary.label("clusters").classes == ("Neuron", "Astro", "OPC")
    assert vae.vae.config.genes_seq_len == 40
    # The eight bytes of each number in the two pickles.
    table = vae.library_sizes.table
    found = {
        c: (table[f"clusters={c}"].mean.hex(), table[f"clusters={c}"].sd.hex()) for c in ("Neuron", "Astro", "OPC")
    }
    assert found == {
        "Neuron": ("0x1.fac6460000000p+1", "0x1.2f655e0000000p-2"),
        "Astro": ("0x1.e411720000000p+1", "0x1.6396a40000000p-2"),
        "OPC": ("0x1.e813e40000000p+1", "0x1.4a35c60000000p-2"),
    }
    assert all(s.n_cells is None for s in table.values())
    if name.startswith("ldm"):
        averaged, raw = (load_flow(tmp_path / "out" / "flow", weights=w) for w in ("ema", "raw"))
        assert averaged.dit.config.strategy == "mutually_exclusive"
        assert any(not torch.equal(a, b) for a, b in zip(averaged.dit.parameters(), raw.dit.parameters(), strict=True))
    card = (tmp_path / "out" / "vae" / "README.md").read_text()
    assert "dentategyrus_train.json" in card
    assert str(CKPT) not in card


@recorded
@pytest.mark.usefixtures("read_here")
def test_a_real_checkpoint_with_the_files_of_another_vocabulary_is_refused(tmp_path):
    names = json.loads((CKPT / "dentategyrus_train.json").read_text())
    names["genes"][3], names["labels"]["clusters"][1] = "Gene99", "Microglia"
    (tmp_path / "other.json").write_text(json.dumps(names))
    options = ("--metadata", tmp_path / "other.json")
    result = run(CKPT / "vae_last.ckpt", CKPT / "vae_config.yaml", tmp_path / "out", *options)
    assert result.exit_code == 2
    for word in ("genes, number 3", "'Gene99'", "'Gene3'"):
        assert word in result.output
    assert not (tmp_path / "out").exists()


def test_a_checkpoint_of_ours_goes_through_the_reader_in_its_own_process(tmp_path):
    exported = export_upstream(write_vae(tmp_path / "vae"), None, tmp_path / "upstream").folder
    result = run(exported / "model.ckpt", exported / "config.yaml", tmp_path / "out")
    assert result.exit_code == 0, result.output
    assert load_vae(tmp_path / "out" / "vae").vocabulary.feature_names == ("G0", "G1", "G2", "G3", "G4", "G5")


def test_a_compiled_and_an_old_layout_give_the_same_model_as_the_plain_one(exported):
    assert exported.run().exit_code == 0
    plain = load_file(exported.out / "flow" / "raw.safetensors")

    def compiled(state: dict[str, Tensor]) -> None:
        for name in [k for k in state if k.startswith("diffusion_model.")]:
            state[name.replace("diffusion_model.", "diffusion_model_compiled._orig_mod.")] = state.pop(name)
        for name in [k for k in state if k.startswith("ema_model.online_model.")]:
            del state[name]

    exported.change_state(compiled)
    assert exported.run("--force").exit_code == 0
    again = load_file(exported.out / "flow" / "raw.safetensors")
    assert again.keys() == plain.keys()
    assert all(torch.equal(plain[name], again[name]) for name in plain)


def test_a_second_run_is_refused_and_force_replaces_only_an_earlier_conversion(exported):
    assert exported.run().exit_code == 0
    before = (exported.out / "vae" / "model.safetensors").stat().st_mtime_ns
    again = exported.run()
    assert (again.exit_code, "--force" in again.output) == (2, True)
    assert (exported.out / "vae" / "model.safetensors").stat().st_mtime_ns == before
    exported.set("model.module.vae_model.encoder.n_layer", 7)
    assert exported.run("--force").exit_code == 2  # a failure leaves the earlier one
    assert (exported.out / "vae" / "model.safetensors").stat().st_mtime_ns == before
    exported.set("model.module.vae_model.encoder.n_layer", 1)
    assert exported.run("--force").exit_code == 0
    assert (exported.out / "vae" / "model.safetensors").stat().st_mtime_ns > before
    assert sorted(p.name for p in exported.out.parent.iterdir()) == ["out", "upstream"]
    (exported.out / "thesis.txt").write_text("mine")
    result = exported.run("--force")
    assert (result.exit_code, "was not written by this command" in result.output) == (2, True)
    assert (exported.out / "thesis.txt").read_text() == "mine"


def test_every_extra_key_is_named(exported):
    def change(state):
        state["loss.weight"] = torch.ones(2)
        state["vae_encoder.weight"] = torch.ones(2)

    exported.change_state(change)
    exported.refused("key 'loss.weight'", "key 'vae_encoder.weight'")


def test_all_names_that_only_one_side_has_are_reported_together(exported):
    def change(state):
        del state["vae_model.decoder_head.params.bias"]
        state["vae_model.decoder_head.extra.weight"] = torch.ones(1)
        state["vae_model.decoder_head.theta.weight"] = torch.ones(9, 1)

    exported.change_state(change)
    exported.refused(
        "vae_model.decoder_head.params.bias is required by the configuration, but not in the checkpoint",
        "vae_model.decoder_head.extra.weight is in the checkpoint, but not required by the configuration",
        "vae_model.decoder_head.theta.weight is (9, 1) in the checkpoint, (7, 1) by the configuration",
    )


def test_missing_and_extra_parts_are_named(exported):
    exported.change_state(
        lambda state: [state.pop(k) for k in list(state) if k.startswith(("ema_model.ema_model.", "ema_model.online"))]
    )
    exported.refused("has no ema_model.ema_model", "models.LatentDiffusion")
    exported.set("model.module._target_", "scldm.models.VAE")
    exported.refused("has diffusion_model", "models.VAE")


def test_copies_that_differ_are_named_with_the_difference(exported):
    def change(state):
        for name in [k for k in state if k.startswith("vae_model.")]:
            state[name.replace("vae_model.", "vae_model_compiled._orig_mod.")] = state[name].clone()
        state["vae_model_compiled._orig_mod.decoder_head.params.bias"] += 0.5
        state["vae_model_compiled._orig_mod.decoder_head.theta.weight"] = torch.ones(2, 1)
        del state["ema_model.online_model.pos_embed"]

    exported.change_state(change)
    exported.refused(
        "vae_model_compiled._orig_mod.decoder_head.params.bias should be a copy of vae_model.decoder_head.params.bias,"
        " but they differ by up to 0.5",
        "decoder_head.theta.weight, but one is (2, 1), the other (7, 1)",
        "diffusion_model.pos_embed has no copy under ema_model.online_model.",
    )


def spoilt(value: float) -> Callable[[Tensor], Tensor]:
    return lambda old: old.index_fill(0, torch.tensor([0]), value)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (spoilt(math.nan), "vae: decoder_head.params.bias holds values that are not finite"),
        (spoilt(-math.inf), "vae: decoder_head.params.bias holds values that are not finite"),
        (lambda old: (old.double() + 1) * 1e300, "decoder_head.params.bias holds values that are not finite"),
        (lambda old: spoilt(math.nan)(old).to(torch.float8_e4m3fn), "holds values that are not finite"),
        (lambda old: old.to(torch.int64), "is of type torch.int64; weights are floating-point numbers"),
        (lambda old: old.to(torch.complex64), "is of type torch.complex64; weights are floating-point numbers"),
    ],
    ids=["nan", "infinity", "too large for single precision", "nan in eight bits", "whole numbers", "complex"],
)
def test_values_that_are_not_weights_are_refused(exported, change, reason):
    name = "vae_model.decoder_head.params.bias"
    exported.change_state(lambda state: state.update({name: change(state[name])}))
    exported.refused("decoder_head.params.bias", reason)


def test_weights_in_half_precision_are_kept_in_single_precision_with_a_note(exported):
    exported.change_state(
        lambda state: state.update({k: v.bfloat16() for k, v in state.items() if k.startswith("vae_model.")})
    )
    result = exported.run()
    assert result.exit_code == 0
    assert "weights of type torch.bfloat16 are kept as torch.float32" in result.output
    assert {v.dtype for v in load_file(exported.out / "vae" / "model.safetensors").values()} == {torch.float32}


def test_counters_of_the_average_that_are_not_integers_are_refused(exported):
    exported.change_state(
        lambda state: state.update({"ema_model.step": torch.tensor(math.nan), "ema_model.initted": torch.ones(2)})
    )
    exported.refused("ema_model.step is torch.float32, not a whole number", "ema_model.initted has 2 values, not one")


def test_an_average_that_had_not_begun_is_reported(exported):
    exported.change_state(lambda state: state.update({"ema_model.initted": torch.tensor(False)}))
    assert "ema_model.initted is false" in exported.run().output
