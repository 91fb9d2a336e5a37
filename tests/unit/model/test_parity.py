"""Every recorded number is compared; differences, gaps and unknown entries are reported, whatever a case is named."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from helpers.models.plain_upstream_vae import PlainVAE, Side
from helpers.models.upstream_fixtures import FOLDER
from parity.case import FolderError
from parity.kinds.schedules import schedule_of
from parity.ledger import Row, largest_difference
from parity.registry import check_case, check_folder, stray_files, summary
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from pipeline.cli.app import app

recorded = pytest.mark.skipif(not FOLDER.is_dir(), reason="upstream's recorded outputs are not beside this checkout")
NAMES = sorted(path.stem for path in FOLDER.glob("*.json")) if FOLDER.is_dir() else []


def failures(rows: list[Row]) -> list[tuple[str, str]]:
    return [(row.quantity, row.note) for row in rows if row.failed]


def copy_case(name: str, folder: Path, new_name: str | None = None) -> Path:
    """A writable copy of a case; returns the folder."""
    folder.mkdir(exist_ok=True)
    for suffix in (".json", ".safetensors"):
        shutil.copyfile(FOLDER / f"{name}{suffix}", folder / f"{new_name or name}{suffix}")
    return folder


def change_tensor(folder: Path, name: str, key: str, change) -> None:
    path = folder / f"{name}.safetensors"
    tensors = load_file(path)
    tensors[key] = change(tensors[key])
    save_file({k: v for k, v in tensors.items() if v is not None}, path)


def change_facts(folder: Path, name: str, change) -> None:
    path = folder / f"{name}.json"
    facts = json.loads(path.read_text())
    change(facts)
    path.write_text(json.dumps(facts))


@pytest.mark.parametrize("name", NAMES)
def test_every_recorded_case_is_reproduced(name):
    rows = check_case(FOLDER, name)
    assert failures(rows) == []
    assert any(row.status == "ok" for row in rows)


@recorded
def test_known_faults_are_listed_with_a_reason_and_are_not_ok():
    rows = [row for name in ("metrics", "samplers", "transport", "tokenize") for row in check_case(FOLDER, name)]
    faults = [row for row in rows if row.status == "known fault"]
    assert len(faults) > 50
    assert all(row.note and row.error is None for row in faults)
    total = summary(rows)
    assert total.quantities == total.ok + total.known_faults
    sinkhorn = next(row for row in faults if row.quantity == "counts/wasserstein2_sinkhorn_reg0.05.f64")
    assert "underflows" in sinkhorn.note
    assert "exact transport, 29.08" in sinkhorn.note


@recorded
def test_a_case_is_known_by_what_it_holds_not_by_its_name(tmp_path):
    folder = copy_case("dit_joint", tmp_path, "something_else")
    change_facts(folder, "something_else", lambda facts: facts.update(fixture="x", section=99))
    rows = check_case(folder, "something_else")
    assert failures(rows) == []
    assert len(rows) == len(check_case(FOLDER, "dit_joint"))


@recorded
def test_a_recorded_vae_may_have_another_number_of_blocks_in_its_decoder(tmp_path):
    name = "vae_log1p_nbshared_pos_shared"
    folder = copy_case(name, tmp_path)
    tensors = load_file(folder / f"{name}.safetensors")
    state = {k.removeprefix("state/"): v for k, v in tensors.items() if k.startswith("state/")}
    state = {k: v for k, v in state.items() if not k.startswith("encoder.encoder_layers.1.")}
    kept = {k: v for k, v in tensors.items() if k.startswith(("in/counts", "in/genes", "in/library_size"))}
    plain = PlainVAE({k: v.double() for k, v in state.items()}, *[Side(4, 4, 1e-8)] * 2)
    ids, sizes = tensors["in/genes"] - 1, tensors["in/library_size"].flatten().tolist()
    counts = torch.zeros(ids.shape[0], 60, dtype=torch.float64).scatter(1, ids, tensors["in/counts"].double())
    z = torch.stack([plain.encode(cell, 60) for cell in counts])
    mu = torch.stack([plain.mean(own, size) for own, size in zip(z, sizes, strict=True)]).gather(1, ids)
    save_file(
        {**kept, **{f"state/{k}": v for k, v in state.items()}, "out/L60/h_z.f64": z, "out/L60/mu.f64": mu},
        folder / f"{name}.safetensors",
    )
    change_facts(folder, name, lambda facts: facts["config"].update(n_layer=1, n_layer_dec=2))
    rows = check_case(folder, name)
    assert [(q, note) for q, note in failures(rows) if "lacks it" not in note] == []  # what this test left out
    assert {row.quantity for row in rows if row.status == "ok"} >= {"out/L60/h_z.f64", "out/L60/mu.f64"}


PERTURBED = [
    ("dit_me_two", "out/forward_both_seed0"),
    ("dit_me_two", "out/cfg/mixed"),
    ("dit_joint", "out/cfg_joint_method/cell_line_scale2"),
    ("dit_joint", "grad/input_proj.weight"),
    ("dit_me_single", "grad_norms"),
    ("dit_me_single", "ref/sincos_16x256"),
    ("dit_me_single", "state/blocks.0.attn.c_proj.weight"),
    ("transport", "coef/GVP/drift_var"),
    ("transport", "train/VP/noise/likelihood/epsNone/loss"),
    ("samplers", "ode/Linear/velocity/dopri550/mid"),
    ("samplers", "sde/VP/noise/SBDM/Heun/Mean/step1"),
    ("samplers", "lik/euler11/logp"),
    ("schedules_optim_ema", "adamw/3/A"),
    ("schedules_optim_ema", "ema/0/ema"),
    ("schedules_optim_ema", "wsd/2/value"),
    ("log_nb_grid", "out/f64"),
    ("log_nb_grid", "out/log_gaussian_sigma"),
    ("metrics", "lognorm/kernel_ruzicka_xy"),
    ("metrics", "counts/mix_rbf_ratio.f64"),
    ("vae_softbin_nbshared_pos_unshared", "out/none/h_z.f64"),
    ("vae_proj_nbunshared_pos_shared", "out/panel/theta.f64"),
    ("vae_adaln_decode_nbshared", "in/condition"),
    ("vae_projconcat_gaussian_nopos_unshared", "grad/input_layer.projection.mix.weight"),
    ("vae_log1p_nbshared_pos_shared", "grad_norms"),
    ("scvi_vae_sharedtheta", "out/kl.f64"),
    ("scvi_vae_unshared", "state/decoder.decoder_mlp.5.running_var"),
]


@recorded
@pytest.mark.parametrize(("name", "key"), PERTURBED)
def test_a_changed_number_fails(tmp_path, name, key):
    folder = copy_case(name, tmp_path)

    # One element, by a thousandth of the tensor's scale.
    def change(tensor):
        tensor = tensor.clone()
        tensor.view(-1)[-1] += 1e-3 * max(float(tensor.abs().max()), 1e-3)
        return tensor

    change_tensor(folder, name, key, change)
    rows = check_case(folder, name)
    bad = {row.quantity for row in rows if row.status == "FAIL"}
    assert bad if key.startswith(("state/", "in/")) else key in bad


@recorded
def test_the_largest_difference_is_over_finite_numbers_in_the_same_places():
    nan = float("nan")
    assert largest_difference(torch.tensor([1.0, nan, 3.0]), torch.tensor([1.5, nan, 3.0])) == (0.5, 3.0)
    assert largest_difference(torch.tensor([1.0, 2.0]), torch.tensor([1.0, nan]))[0] == float("inf")
    assert largest_difference(torch.tensor([float("inf")]), torch.tensor([-float("inf")]))[0] == float("inf")


@recorded
def test_changed_scalars_of_the_description_fail(tmp_path):
    folder = copy_case("samplers", copy_case("metrics", copy_case("transport", tmp_path)))

    def change(facts):
        if "ode" in facts:
            facts["ode"][2]["nfe"] += 1
        if "scalars" in facts:
            facts["scalars"]["counts/wasserstein1_emd_reg0.05.f64"] *= 1.001
            facts["scalars"]["counts/wasserstein1_sinkhorn_reg1.0.f64"] *= 0.5
        if "intervals" in facts:
            facts["intervals"]["Linear/velocity/train_eps=None/sample_eps=None"]['{"eval": true, "reverse": true}'] = [
                1,
                0.1,
            ]

    for name in ("samplers", "metrics", "transport"):
        change_facts(folder, name, change)
    bad = {
        row.quantity for name in ("samplers", "metrics", "transport") for row in check_case(folder, name) if row.failed
    }
    assert bad == {
        "ode/Linear/velocity/euler20 nfe",
        "counts/wasserstein1_emd_reg0.05.f64",
        "counts/wasserstein1_sinkhorn_reg1.0.f64",
        'intervals/Linear/velocity/train_eps=None/sample_eps=None/{"eval": true, "reverse": true}',
    }


@recorded
def test_what_no_comparison_knows_is_reported(tmp_path):
    folder = copy_case("dit_joint", tmp_path)
    tensors = load_file(folder / "dit_joint.safetensors") | {"out/attention": torch.zeros(2)}
    del tensors["out/cfg/w2"]
    save_file(tensors, folder / "dit_joint.safetensors")
    change_facts(folder, "dit_joint", lambda facts: facts.update(entropy=[1.0], remark="words"))
    assert failures(check_case(folder, "dit_joint")) == [
        ("out/cfg/w2", "dit_joint.json lists it; dit_joint.safetensors lacks it"),
        ("out/attention", "no comparison knows this tensor"),
        ("dit_joint.json: entropy", "no comparison knows this entry"),
    ]


@recorded
def test_half_cases_broken_files_and_strangers_are_reported_and_the_rest_still_runs(tmp_path):
    folder = copy_case("log_nb_grid", copy_case("dit_joint", copy_case("transport", tmp_path)))
    (folder / "dit_joint.json").unlink()
    (folder / "transport.json").write_text("{")
    (folder / "notes.txt").write_text("?")
    (folder / "README.md").write_text("words")
    (folder / "deep").mkdir()
    (folder / "deep" / "x.ckpt").write_bytes(b"?")
    save_file({"a": torch.zeros(1)}, folder / "odd.safetensors")
    (folder / "odd.json").write_text("{}")
    rows = list(check_folder(folder))
    assert {(row.case, row.quantity) for row in rows if row.failed} == {
        ("dit_joint", "case"),
        ("transport", "case"),
        ("odd", "case"),
        ("notes.txt", "file"),
        ("deep/x.ckpt", "file"),
    }
    assert {row.note for row in rows if row.case == "dit_joint"} == {"dit_joint.json is missing"}
    assert any(row.case == "log_nb_grid" and row.status == "ok" for row in rows)


@recorded
def test_weights_of_another_width_fail_and_say_so(tmp_path):
    folder = copy_case("dit_joint", tmp_path)
    change_facts(folder, "dit_joint", lambda facts: facts["config"].update(n_embed=64))
    rows = check_case(folder, "dit_joint")
    assert any(row.status == "FAIL" and "size mismatch" in row.note for row in rows)


@recorded
def test_the_command_prints_a_line_per_quantity_and_a_summary_and_writes_rows(tmp_path):
    folder = copy_case("log_nb_grid", tmp_path / "cases")
    result = CliRunner().invoke(app, ["parity", str(folder), "--all", "--json", str(tmp_path / "rows.json")])
    assert result.exit_code == 0, result.output
    lines = result.output.splitlines()
    assert len(lines) == 1 + 5 + 1
    assert lines[1].split()[:2] == ["log_nb_grid", "out/f64"]
    assert lines[-1] == "1 cases, 5 quantities: 5 ok, 0 known faults of upstream, 0 failures"
    content = json.loads((tmp_path / "rows.json").read_text())
    assert content["summary"]["ok"] == 5
    assert {row["quantity"] for row in content["rows"] if row["ok"]} == {line.split()[1] for line in lines[1:6]}


@recorded
def test_the_command_exits_1_where_a_file_is_not_understood(tmp_path):
    folder = copy_case("log_nb_grid", tmp_path)
    (folder / "stranger.bin").write_bytes(b"?")
    result = CliRunner().invoke(app, ["parity", str(folder)])
    assert result.exit_code == 1
    lines = result.output.splitlines()
    assert [line.split()[0] for line in lines[1:-1]] == ["log_nb_grid", "stranger.bin"]
    assert lines[2].endswith("not understood  (no case names this file)")


def test_the_command_exits_2_for_a_folder_without_cases(tmp_path):
    for folder in (tmp_path, tmp_path / "absent"):
        result = CliRunner().invoke(app, ["parity", str(folder)])
        assert result.exit_code == 2
        assert str(folder) in result.output
    with pytest.raises(FolderError, match="holds no case"):
        list(check_folder(tmp_path))


def test_a_schedule_is_read_from_its_description_without_running_it():
    text = 'LambdaLR(wsd_schedule(20,num_warmup_steps=4,fract_decay=.5,decay_type="sqrt"))'
    assert schedule_of(text) == {
        "num_training_steps": 20, "num_warmup_steps": 4, "fract_decay": 0.5, "decay_type": "sqrt"
    }  # fmt: skip
    with pytest.raises(ValueError, match="malformed node"):
        schedule_of("wsd_schedule(open)")


def test_files_that_a_case_names_are_no_strangers(tmp_path):
    (tmp_path / "a.pkl").write_bytes(b"")
    (tmp_path / "b.pkl").write_bytes(b"")
    assert stray_files(tmp_path, {tmp_path / "a.pkl"}) == [Path("b.pkl")]
