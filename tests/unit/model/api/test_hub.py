"""Models are shared by the Hugging Face hub: pushed as one commit, found by name and revision, and checked."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from helpers.models.small_models import CELL_TYPES, write_flow, write_vae
from helpers.servers.hub_server import TOKEN, hub_server
from huggingface_hub import ModelCard, constants

import scldm
from scldm.api.arguments import ArgumentError
from scldm.api.hub.download import commit_of
from scldm.checkpoints.native import folder_digest
from scldm.errors import CheckpointError


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A hub on this machine, a cache of its own, and no token but those that a test gives."""
    with hub_server() as server:
        monkeypatch.setattr(constants, "ENDPOINT", server.address)
        files = f"{server.address}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", files)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "no-token"))
        monkeypatch.delenv("HF_TOKEN", raising=False)
        monkeypatch.chdir(tmp_path)
        yield server


@pytest.fixture
def model(tmp_path):
    write_vae(tmp_path / "pair" / "vae", CELL_TYPES)
    write_flow(tmp_path / "pair" / "flow", CELL_TYPES)
    return scldm.load(tmp_path / "pair")


def push(model, **kwargs):
    return model.push_to_hub("lab/blood", token=TOKEN, **kwargs)


def test_a_pushed_model_is_loaded_by_its_name_and_makes_the_same_cells(hub, model):
    name = push(model)
    assert name == f"hf://lab/blood@{hub.repositories['lab/blood'].branches['main']}"
    again = scldm.Model.from_pretrained("lab/blood")
    for part in ("vae", "flow"):
        assert folder_digest(getattr(again.folders, part)) == folder_digest(getattr(model.folders, part))
    ours, theirs = (m.generate({"cell_type": "B"}, n=5, seed=3) for m in (model, again))
    assert (ours.X != theirs.X).nnz == 0
    assert ours.obs_names.tolist() == theirs.obs_names.tolist()


def test_cells_name_the_commit_that_their_model_came_from(hub, model):
    name = push(model)
    again = scldm.Model.from_pretrained("lab/blood", revision="main")
    cells = again.generate({"cell_type": "B"}, n=2)
    assert cells.uns["scldm"]["source"] == name
    assert again.reconstruct(cells).uns["scldm"]["source"] == name
    assert again.encode(cells).uns["X_scldm"]["source"] == name
    assert "source" not in model.generate({"cell_type": "B"}, n=2).uns["scldm"]


def test_a_revision_pins_a_commit_and_a_branch_is_a_place_to_push_to(hub, model, tmp_path):
    first = push(model)
    write_vae(tmp_path / "other", CELL_TYPES, n_layers=2)
    second = push(scldm.load(tmp_path / "other"), revision="trial", commit_message="Two layers")
    assert hub.repositories["lab/blood"].messages[-1] == "Two layers"
    old = scldm.Model.from_pretrained("lab/blood", revision=first.partition("@")[2])
    assert folder_digest(old.folders.vae) == folder_digest(model.folders.vae)
    assert scldm.Model.from_pretrained("lab/blood@trial").flow is None
    assert commit_of(scldm.load(second).folders.vae) == second
    assert scldm.Model.from_pretrained("lab/blood").flow is not None


def test_parts_of_an_earlier_model_are_removed_in_the_same_commit(hub, model, tmp_path):
    push(model)
    write_vae(tmp_path / "alone", CELL_TYPES, n_layers=2)
    push(scldm.load(tmp_path / "alone"))
    repository = hub.repositories["lab/blood"]
    assert len(repository.messages) == 3, "the hub's first commit, and one for each push"
    assert not [path for path in repository.commits[repository.branches["main"]] if path.startswith("flow/")]


def test_weights_are_uploaded_once(hub, model):
    push(model)
    before = hub.uploads
    assert before >= 2
    push(model, revision="copy")
    assert hub.uploads == before


def test_the_card_is_one_that_the_hub_reads_and_a_stated_licence_stays(hub, model):
    push(model)
    repository = hub.repositories["lab/blood"]
    files = repository.commits[repository.branches["main"]]
    card = ModelCard(files["README.md"].decode(), ignore_metadata_errors=False)
    assert card.data.to_dict() == {
        "library_name": "scldm",
        "license": "unknown",
        "tags": ["single-cell", "rna-seq", "generative", "flow-matching"],
    }
    assert "# lab/blood" in card.text
    assert 'scldm.Model.from_pretrained("lab/blood")' in card.text
    repository.commit(
        "main", {**files, "README.md": files["README.md"].replace(b"license: unknown", b"license: mit")}, ""
    )
    push(model)
    assert ModelCard(repository.commits[repository.branches["main"]]["README.md"].decode()).data.license == "mit"


def test_a_damaged_file_is_named(hub, model):
    push(model)
    repository = hub.repositories["lab/blood"]
    files = dict(repository.commits[repository.branches["main"]])
    files["vae/model.safetensors"] = files["vae/model.safetensors"][:-1] + b"x"
    del files["flow/library_size.json"]
    repository.commit("main", files, "spoiled")
    with pytest.raises(CheckpointError) as caught:
        scldm.Model.from_pretrained("lab/blood")
    assert "vae/model.safetensors has sha256" in str(caught.value)
    assert "flow/library_size.json is missing" in str(caught.value)


def test_a_damaged_copy_of_a_saved_folder_is_named_too(model, tmp_path):
    folder = model.save_pretrained(tmp_path / "saved")
    card = folder / "README.md"
    card.write_text(card.read_text().replace("license: unknown", "license: mit"))  # a publisher's edit
    scldm.Model.from_pretrained(folder)
    weights = folder / "flow" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"x")
    with pytest.raises(CheckpointError, match=r"flow/model.safetensors has sha256 .*; copy it again"):
        scldm.Model.from_pretrained(str(folder))


def test_neither_pickles_nor_code_are_fetched(hub, model):
    push(model)
    repository = hub.repositories["lab/blood"]
    files = repository.commits[repository.branches["main"]]
    repository.commit("main", {**files, "vae/model.bin": b"x", "modeling.py": b"x"}, "more")
    root = scldm.Model.from_pretrained("lab/blood").folders.vae.parent
    assert {p.suffix for p in root.rglob("*") if p.is_file()} == {".json", ".safetensors", ".md"}


def test_another_model_in_the_repository_is_left_alone(hub, model):
    push(model)
    repository = hub.repositories["lab/blood"]
    repository.commit("main", {"pytorch_model.bin": b"x"}, "another")
    with pytest.raises(CheckpointError, match=r"holds pytorch_model[.]bin and no model of scldm"):
        push(model)
    assert repository.messages[-1] == "another"


def test_a_refusal_says_how_to_log_in_and_shows_no_token(hub, model):
    with pytest.raises(CheckpointError, match=r"lab/blood cannot be written.*`hf auth login`") as caught:
        model.push_to_hub("lab/blood", token="hf_secret")
    assert "hf_secret" not in str(caught.value)
    assert hub.repositories == {}


def test_a_private_repository_is_read_with_a_token(hub, model):
    push(model, private=True)
    assert hub.repositories["lab/blood"].private
    with pytest.raises(CheckpointError, match=r"there is no folder .*/lab/blood, and hf://lab/blood cannot be fetched"):
        scldm.Model.from_pretrained("lab/blood")
    assert scldm.Model.from_pretrained("lab/blood", token=TOKEN).flow is not None


def test_arguments_of_a_push_are_checked_together_before_anything_is_sent(hub, model):
    with pytest.raises(ArgumentError) as caught:
        model.push_to_hub("blood", revision="a" * 40, private=1, token=3, commit_message=4)
    assert len(str(caught.value).splitlines()) == 5
    assert hub.repositories == {}


# ---- a folder or the hub -------------------------------------------------------------------------------------------
def test_a_folder_with_a_model_comes_before_the_hub_unless_a_revision_or_a_scheme_is_given(hub, model, tmp_path):
    push(model)
    write_vae(tmp_path / "lab" / "blood" / "vae", CELL_TYPES, n_layers=2)
    assert scldm.Model.from_pretrained("lab/blood").flow is None
    for name, more in (("hf://lab/blood", {}), ("lab/blood", {"revision": "main"})):
        assert scldm.Model.from_pretrained(name, **more).flow is not None


def test_a_folder_without_a_model_is_not_passed_over(hub, model, tmp_path):
    push(model)
    (tmp_path / "lab" / "blood").mkdir(parents=True)
    with pytest.raises(CheckpointError, match="If the repository of that name is meant: hf://lab/blood"):
        scldm.Model.from_pretrained("lab/blood")
    with pytest.raises(CheckpointError) as caught:
        scldm.Model.from_pretrained(Path("lab/blood"))
    assert "hf://lab/blood" not in str(caught.value).split("; name a")[0]


@pytest.mark.parametrize(
    ("name", "revision", "said"),
    [
        ("/lab/blood", "main", "a revision belongs to a repository of the hub"),
        ("lab/blood@v1", "v2", "leave one out"),
        ("lab/blood", 3, "revision must be a text or None"),
        (None, None, "name must be a path"),
    ],
)
def test_a_name_and_a_revision_that_do_not_go_together_are_refused(name, revision, said):
    with pytest.raises((CheckpointError, ArgumentError), match=said):
        scldm.Model.from_pretrained(name, revision=revision)


# ---- as a user has it ----------------------------------------------------------------------------------------------
ANOTHER = """
import scldm
name = scldm.load({pair!r}).push_to_hub("lab/blood")
cells = scldm.Model.from_pretrained("lab/blood").generate({{"cell_type": "B"}}, n=2)
assert cells.uns["scldm"]["source"] == name
print(name)
"""


def test_the_endpoint_and_the_token_of_the_environment_are_used(hub, model, tmp_path):
    root = Path(__file__).resolve().parents[4]
    env = {**os.environ, "HF_ENDPOINT": hub.address, "HF_HOME": str(tmp_path / "home"), "HF_TOKEN": TOKEN,
           "HF_HUB_DISABLE_XET": "1", "PYTHONPATH": str(root)}  # fmt: skip
    code = ANOTHER.format(pair=str(tmp_path / "pair"))
    done = subprocess.run(
        [sys.executable, "-c", code], env=env, capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.strip() in {f"hf://lab/blood@{c}" for c in hub.repositories["lab/blood"].commits}


def test_the_index_lists_the_sum_of_every_file_but_the_cards(model, tmp_path):
    folder = model.save_pretrained(tmp_path / "saved")
    sums = json.loads((folder / "model_index.json").read_text())["sha256"]
    written = {p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file()}
    assert set(sums) == {n for n in written if not n.endswith("README.md")} - {"model_index.json"}
    assert np.all([len(x) == 64 for x in sums.values()])
