"""Our models are exported as upstream checkpoints and restored bit for bit; unsupported settings are refused."""

from __future__ import annotations

import json
import pickle
from pathlib import Path

import pytest
import torch
from helpers.models.label_values import number
from helpers.models.small_models import CELL_TYPES, DONORS, GENES, library_sizes, vocabulary, write_flow, write_vae
from helpers.models.upstream_fixtures import FOLDER
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from pipeline.cli.app import app
from scldm.checkpoints.convert.convert import convert_upstream
from scldm.checkpoints.convert.export import export_upstream, upstream_vae_values
from scldm.checkpoints.native import load_flow, load_vae
from scldm.checkpoints.untrusted.reader import ForeignCheckpoint
from scldm.checkpoints.upstream.sizes import library_sizes_from_upstream, size_factors_to_upstream
from scldm.data.library_size import LibrarySizes, LogNormal, condition_key
from scldm.data.vocabulary import LabelVocabulary
from scldm.errors import CheckpointError
from scldm.flow.config import ControlStart, PathConfig

recorded = pytest.mark.skipif(not FOLDER.is_dir(), reason="upstream's recorded outputs are not beside this checkout")
INPUTS = ("log1p", "log1pzero", "sqrt", "anscombe", "proj", "projconcat", "softbin")


def there_and_back(tmp_path: Path, vae: Path, flow: Path | None = None):
    """Export and convert; our own file is read in this process."""
    exported = export_upstream(vae, flow, tmp_path / "upstream").folder
    whole = torch.load(exported / "model.ckpt", weights_only=True)
    about = {k: v for k, v in whole.items() if k != "state_dict"}
    foreign = ForeignCheckpoint(whole["state_dict"], about, {}, ())
    return convert_upstream(exported / "model.ckpt", exported / "config.yaml", tmp_path / "back", foreign=foreign)


def assert_equal_weights(a: Path, b: Path) -> None:
    first, second = load_file(a), load_file(b)
    assert first.keys() == second.keys()
    for name, value in first.items():
        assert value.dtype == second[name].dtype
        assert torch.equal(value, second[name]), name


def config_of(folder: Path) -> dict:
    return json.loads((folder / "config.json").read_text())


@pytest.mark.parametrize(
    "choices",
    [
        *({"input": mode} for mode in INPUTS),
        {"head": "nb_cell", "bias": True, "zero_positions": True},
        {"head": "gaussian", "shared_embedding": False, "n_layers": 2},
        {"decoder": {"n_layers": 2}},
        {"n_layers": 2, "decoder": {"n_layers": 0, "n_heads": 4, "n_heads_cross": 1, "multiple_of": 6, "bias": True}},
        {"decoder": {"d_model": 12, "n_heads_cross": 3, "eps": 1e-5}, "shared_embedding": False, "head": "nb_cell"},
        {"head": "gaussian", "decoder": {"head_eps": 1e-5}},
        {"temperature": 0.7, "adaln": True, "multiple_of": 6, "eps": 1e-5, "genes_seq_len": 4},
    ],
    ids=str,
)
def test_a_vae_is_restored_bit_for_bit(tmp_path, choices):
    vae = write_vae(tmp_path / "vae", **choices)
    done = there_and_back(tmp_path, vae)
    assert_equal_weights(vae / "model.safetensors", done.vae / "model.safetensors")
    assert config_of(done.vae) == config_of(vae)
    back = load_vae(done.vae)
    assert back.vocabulary == vocabulary()
    assert done.flow is None


@pytest.mark.parametrize(
    ("labels", "choices", "path"),
    [
        ((CELL_TYPES,), {"strategy": "mutually_exclusive"}, PathConfig()),
        ((CELL_TYPES, DONORS), {"strategy": "mutually_exclusive", "bias": False}, PathConfig(path="vp")),
        ((CELL_TYPES, DONORS), {"strategy": "joint", "n_layers": 2}, PathConfig(path="gvp", prediction="score")),
        ((DONORS, CELL_TYPES), {"label_dropout": 0.0, "eps": 1e-6}, PathConfig(prediction="noise")),
    ],
)  # fmt: skip
def test_both_weights_of_a_flow_are_restored_bit_for_bit(tmp_path, labels, choices, path):
    vae = write_vae(tmp_path / "vae", *labels)
    flow = write_flow(tmp_path / "flow", *labels, path=path, **choices)
    done = there_and_back(tmp_path, vae, flow)
    for name in ("model.safetensors", "raw.safetensors"):
        assert_equal_weights(flow / name, done.flow / name)
    assert not torch.equal(*(next(iter(load_file(done.flow / f"{n}.safetensors").values())) for n in ("model", "raw")))
    assert config_of(done.flow) == config_of(flow)
    assert load_flow(done.flow).vocabulary == vocabulary(*labels)
    assert load_flow(done.flow, weights="raw").path == path
    means = {key: s.mean for key, s in load_flow(done.flow).library_sizes.table.items() if key != "all"}
    assert means == {key: s.mean for key, s in library_sizes(*labels).table.items() if key != "all"}


def test_the_size_factors_are_tables_by_label_and_class(tmp_path):
    vae, flow = write_vae(tmp_path / "vae"), write_flow(tmp_path / "flow")
    done = export_upstream(vae, flow, tmp_path / "upstream")
    assert done.files == (
        "config.yaml", "genes.parquet", "log_size_factor_mu.pkl", "log_size_factor_sd.pkl", "metadata.json",
        "model.ckpt",
    )  # fmt: skip
    read = [pickle.loads((done.folder / f"log_size_factor_{n}.pkl").read_bytes()) for n in ("mu", "sd")]
    assert read == [{"cell_type": {"T": 5.0, "B": 6.0, "NK": 7.0}}, {"cell_type": {"T": 0.5, "B": 0.5, "NK": 0.5}}]
    metadata = json.loads((done.folder / "metadata.json").read_text())
    assert metadata == {"genes": list(GENES), "labels": {"cell_type": ["T", "B", "NK"]}}
    assert any("numbers of cells are left out" in note for note in done.notes)


def test_a_flow_that_starts_at_control_cells_is_refused_and_nothing_is_written(tmp_path):
    start = ControlStart(label="cell_type", control="T", share=0.5)
    vae, flow = write_vae(tmp_path / "vae"), write_flow(tmp_path / "flow", start=start)
    with pytest.raises(
        CheckpointError, match=r"control cells \(cell_type T\) too, and upstream's flows start at noise"
    ):
        export_upstream(vae, flow, tmp_path / "upstream")
    assert not (tmp_path / "upstream").exists()


def test_statistics_of_combinations_are_restored():
    classes = {x.name: x.classes for x in (CELL_TYPES, DONORS)}
    combinations = [{"cell_type": c, "donor": d} for c in CELL_TYPES.classes for d in DONORS.classes]
    table = {condition_key(c): LogNormal(float(i), 0.5, None, condition_key(c)) for i, c in enumerate(combinations)}
    factors = size_factors_to_upstream(LibrarySizes(table | {"all": LogNormal(2.5, 2.0, None)}), classes)
    assert factors.mu == {"cell_type_donor": {"T_d1": 0, "T_d_2": 1, "B_d1": 2, "B_d_2": 3, "NK_d1": 4, "NK_d_2": 5}}
    back, notes = library_sizes_from_upstream(factors, classes)
    assert {key: back.table[key] for key in table} == table
    assert back.table["all"].mean == 2.5  # the middle of 0 … 5
    assert notes == []


def test_classes_that_upstream_would_give_one_name_are_refused():
    classes = {"a": ["x", "x_y"], "b": ["z", "y_z"]}
    conditions = [{"a": "x", "b": "y_z"}, {"a": "x_y", "b": "z"}]
    table = {condition_key(c): LogNormal(1.0, 1.0, None) for c in conditions} | {"all": LogNormal(1.0, 1.0, None)}
    with pytest.raises(
        CheckpointError, match=r"'a': 'x', 'b': 'y_z'.* and .*'a': 'x_y', 'b': 'z'.* would have one name"
    ):
        size_factors_to_upstream(LibrarySizes(table), classes)


def test_a_vae_that_upstream_cannot_represent_is_refused_by_the_names_of_all_its_settings(tmp_path):
    vae = write_vae(tmp_path / "vae", input="count_aware", gene_bias=True, genes_seq_len=None)
    result = CliRunner().invoke(app, ["export", str(vae), "--to", "upstream", "--out", str(tmp_path / "upstream")])
    assert result.exit_code == 2
    for words in ("input is count_aware", "gene_bias is true", "genes_seq_len is null"):
        assert words in result.output
    assert sorted(p.name for p in tmp_path.iterdir()) == ["vae"]


@pytest.mark.parametrize(
    ("choices", "named"),
    [
        ({"input": "count_aware"}, "input"),
        ({"gene_bias": True}, "gene_bias"),
        ({"genes_seq_len": None}, "genes_seq_len"),
    ],
)  # fmt: skip
def test_each_setting_that_upstream_lacks_is_refused(tmp_path, choices, named):
    config = load_vae(write_vae(tmp_path / "vae", **choices)).vae.config
    with pytest.raises(CheckpointError) as refused:
        upstream_vae_values(config)
    (reason,) = str(refused.value).splitlines()[1:]
    assert reason.strip().startswith(named)


def test_a_null_class_where_upstream_has_none_is_refused(tmp_path):
    vae, flow = write_vae(tmp_path / "vae"), write_flow(tmp_path / "flow", label_dropout=0.0)
    weights = load_file(flow / "raw.safetensors")
    (table,) = (name for name in weights if name.startswith("labels."))
    weights[table][-1, 0] = 1.0
    save_file(weights, flow / "raw.safetensors")
    with pytest.raises(CheckpointError, match=r"the null class of class_embeddings.cell_type.weight is not zero"):
        export_upstream(vae, flow, tmp_path / "upstream")


def test_a_vae_and_a_flow_that_do_not_belong_together_are_refused(tmp_path):
    flow = write_flow(tmp_path / "flow")
    with pytest.raises(CheckpointError, match=r"latents \(3, 4\), the VAE has \(5, 4\)"):
        export_upstream(write_vae(tmp_path / "vae", n_latent_tokens=5), flow, tmp_path / "upstream")
    vae = write_vae(tmp_path / "other")
    names = json.loads((vae / "vocabulary.json").read_text())
    names["feature_ids"].reverse()
    (vae / "vocabulary.json").write_text(json.dumps(names))
    with pytest.raises(CheckpointError, match="different genes, or another order"):
        export_upstream(vae, flow, tmp_path / "upstream")
    assert not (tmp_path / "upstream").exists()


def test_an_export_is_replaced_only_with_force_and_nothing_else_is(tmp_path):
    vae = write_vae(tmp_path / "vae")
    command = ["export", str(vae), "--to", "upstream", "--out", str(tmp_path / "upstream")]
    assert CliRunner().invoke(app, command).exit_code == 0
    again = CliRunner().invoke(app, command)
    assert (again.exit_code, "--force" in again.output) == (2, True)
    assert CliRunner().invoke(app, [*command, "--force"]).exit_code == 0
    assert sorted(p.name for p in tmp_path.iterdir()) == ["upstream", "vae"]
    result = CliRunner().invoke(app, ["export", str(vae), "--to", "upstream", "--out", str(vae), "--force"])
    assert (result.exit_code, "was not written by this command" in result.output) == (2, True)


def test_another_format_is_bad_input(tmp_path):
    result = CliRunner().invoke(app, ["export", str(tmp_path), "--to", "onnx", "--out", str(tmp_path / "out")])
    assert result.exit_code == 2
    result = CliRunner().invoke(app, ["export", str(tmp_path), "--to", "upstream", "--out", str(tmp_path / "out")])
    assert (result.exit_code, "has no config.json" in result.output) == (2, True)


@recorded
@pytest.mark.parametrize("kind", ["vae", "ldm"])
def test_the_state_dict_has_the_keys_and_shapes_of_upstreams_own(tmp_path, kind):
    keys = json.loads((FOLDER / "ckpt" / "state_dict_keys.json").read_text())[f"{kind}_last.ckpt"]
    clusters = LabelVocabulary("clusters", ("Neuron", "Astro", "OPC"))
    vae = write_vae(tmp_path / "vae", clusters, zero_positions=True)
    flow = write_flow(tmp_path / "flow", clusters, label_dropout=0.8, strategy="mutually_exclusive")
    done = export_upstream(vae, flow if kind == "ldm" else None, tmp_path / "upstream")
    whole = torch.load(done.folder / "model.ckpt", weights_only=True)
    assert whole["state_dict"].keys() == set(keys)
    assert whole.keys() == {"epoch", "global_step", "pytorch-lightning_version", "state_dict"}
    state = whole["state_dict"]
    assert state["vae_model.input_layer.gene_embedding.weight"].shape == (1 + len(GENES), 8)  # a row for the pad
    assert state["vae_model.decoder_head.theta.weight"].shape == (1 + len(GENES), 1)
    if kind == "ldm":
        assert state["diffusion_model.class_embeddings.clusters.weight"].shape == (4, 12)  # and the null class
        assert state["ema_model.initted"].item() is True


def test_a_flow_whose_labels_are_values_is_refused_and_its_vae_is_not(tmp_path):
    labels = (CELL_TYPES, number(unit="uM"))
    vae, flow = write_vae(tmp_path / "vae", *labels), write_flow(tmp_path / "flow", *labels)
    with pytest.raises(
        CheckpointError, match=r"tables of classes only, and dose is a number in uM, linear scale, 1 to 10"
    ):
        export_upstream(vae, flow, tmp_path / "upstream")
    assert not (tmp_path / "upstream").exists()
    assert export_upstream(vae, None, tmp_path / "upstream").files
