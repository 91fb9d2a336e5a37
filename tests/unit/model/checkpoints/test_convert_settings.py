"""Upstream's configurations: mismatches are refused with both values, and nothing in them is run."""

from __future__ import annotations

import pytest
from helpers.models.exported_model import Exported, new_export

from scldm.checkpoints.native import load_vae
from scldm.checkpoints.upstream.yaml import UpstreamYaml

VAE, MODULE = "model.module.vae_model", "model.module"


@pytest.fixture
def exported(tmp_path, monkeypatch) -> Exported:
    return new_export(tmp_path, monkeypatch)


@pytest.mark.parametrize(
    ("at", "value", "words"),
    [
        (f"{VAE}.encoder.n_embed", 16, ["input_layer.n_embed is 8, but", "encoder.n_embed is 16"]),
        (f"{VAE}.encoder.n_layer", 2, ["encoder_layers.1.ln_1.weight is required by the configuration"]),
        (f"{VAE}.decoder.n_layer", 2, ["decoder_layers.1.ln_1.weight is required by the configuration"]),
        (f"{VAE}.decoder.n_head", 3, ["decoder.d_model (8) must be a multiple of decoder.n_heads (3)"]),
        (f"{VAE}.decoder.n_embed", 16, ["decoder_head.n_embed is 8, but", "decoder.n_embed is 16"]),
        (f"{VAE}.decoder.n_embed_latent", 7, ["decoder.n_embed_latent is 7, but", "encoder.n_embed_latent is 4"]),
        (f"{VAE}.input_layer.n_genes", 7, ["decoder.n_genes is 6, but", "input_layer.n_genes is 7"]),
        (f"{VAE}.encoder.n_embed", "8", [f"{VAE}.encoder.n_embed must be a whole number; got '8'"]),
        (f"{VAE}.encoder.window", 4, [f"{VAE}.encoder has settings that are not understood: window"]),
        (f"{VAE}.input_layer.agg_func", "log2", ["agg is 'log2'; known: log1p"]),
        (f"{VAE}.encoder._target_", "os.system", ["_target_ is os.system; known here: scldm.nnets.Encoder"]),
        (f"{MODULE}.transport.path_type", "Cubic", ["path_type is 'Cubic'; known: Linear, GVP, VP"]),
        (f"{MODULE}.transport.time", 2, ["transport has settings that are not understood: time"]),
        (f"{MODULE}.diffusion_model.seq_len", 5, ["seq_len is 5, but the VAE's latents have 3"]),
        (f"{MODULE}.diffusion_model.n_embed", 24, ["(12, 12) in the checkpoint, (24, 24) by the configuration"]),
        (f"{MODULE}.diffusion_model.n_embed", 12_000_000, ["(12,) in the checkpoint, (12000000,) by the"]),
        (f"{MODULE}.diffusion_model.n_head", 5, ["d_model (12) must be a multiple of n_heads (5)"]),
        (f"{MODULE}.diffusion_model.cfg_dropout_prob", 1.0, ["label_dropout: Input should be less than 1; got 1.0"]),
        (f"{MODULE}.diffusion_model.class_vocab_sizes", {"donor": 2}, ["{'cell_type': 3}, but", "{'donor': 2}"]),
        ("datamodule.datamodule.genes_seq_len", None, ["genes_seq_len is missing: give it with --genes-seq-len"]),
        ("datamodule.datamodule.genes_seq_len", "${eval:'6'}", ["${eval:'6'}: resolvers are not run"]),
    ],
)  # fmt: skip
def test_a_mismatched_configuration_is_refused_with_both_values(exported, at, value, words):
    exported.set(at, value)
    exported.refused(*words)


def test_a_width_that_is_wrong_everywhere_is_refused_with_both_shapes(exported):
    text = exported.config.read_text()
    exported.config.write_text(text.replace("n_embed: 8", "n_embed: 16"))
    output = exported.refused(
        "vae_model.input_layer.gene_embedding.weight is (7, 8) in the checkpoint, (7, 16) by the configuration",
        "… and ",
    )
    assert len(output.splitlines()) < 20


def test_all_problems_of_a_configuration_are_reported_together(exported):
    exported.set(f"{VAE}.encoder.window", 4)
    exported.set(f"{VAE}.decoder.n_embed_latent", 7)
    exported.set(f"{MODULE}.diffusion_model.n_layer", "many")
    exported.set("datamodule.datamodule.genes_seq_len", None)
    exported.refused(
        "encoder has settings that are not understood: window", "decoder.n_embed_latent is 7, but",
        "diffusion_model.n_layer must be a whole number; got 'many'", "genes_seq_len is missing",
    )  # fmt: skip


def test_the_given_length_wins_over_the_configurations(exported):
    assert exported.run("--genes-seq-len", 4).exit_code == 0
    assert load_vae(exported.out / "vae").vae.config.genes_seq_len == 4


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("a: !!python/object/apply:os.system ['touch canary']", "could not determine a constructor"),
        ("a: &x [1]\nb: *x", "uses YAML aliases"),
        ("a: 1\na: 2", "found duplicate key a"),
        ("\ta: 1", "line 1, column 1"),
        ("- 1", "must hold a dictionary"),
        ("a: " + "[" * 100_000, "nested more than 40 levels"),
        ("a:\n" + "- 1\n" * 20_000, "more than 10,000 names and values"),
        ("a: " + "x" * (2 << 20), "a configuration has at most 1,048,576"),
        ("a: ${b}\nb: ${a}", "is missing"),
    ],
)
def test_a_file_that_is_not_a_configuration_is_refused_and_runs_nothing(exported, text, reason, monkeypatch):
    monkeypatch.chdir(exported.folder)
    exported.config.write_text(text)
    exported.refused(str(exported.config), reason)
    assert not (exported.folder / "canary").exists()


def test_interpolations_are_followed_and_resolvers_are_not_run(tmp_path):
    path = tmp_path / "config.yaml"
    path.write_text("kind: b\nsizes: {a: 1, b: 2}\nsize: ${sizes.${kind}}\nhome: ${oc.env:HOME}\nloop: ${loop}")
    y = UpstreamYaml(path)
    assert y.value("size", int) == 2
    assert y.optional("home", str) is None
    assert y.problems == []
    y.value("home", str)
    y.value("loop", int)
    assert y.problems[0] == "home is ${oc.env:HOME}: resolvers are not run; write the value into the file"
    assert y.problems[1].startswith("loop cannot be resolved: ")
