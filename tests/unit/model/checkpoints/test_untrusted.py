"""Untrusted pickles: nothing they name is run, refusals name what they import, and every reading ends."""

from __future__ import annotations

import argparse
import io
import pickle
import subprocess
import sys
from collections import OrderedDict, defaultdict
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.files import foreign_files

from scldm.checkpoints.untrusted import child as untrusted_child
from scldm.checkpoints.untrusted import reader as untrusted
from scldm.checkpoints.untrusted.reader import UntrustedFileError, read_checkpoint, read_pickle
from scldm.errors import CheckpointError

foreign = untrusted_child.rules  # the copy that the reader itself uses
ATTACKS = list(foreign_files.attacks(Path("canary")))


def file_of(folder: Path, data: bytes, name: str = "size_factors.pkl") -> Path:
    path = folder / name
    path.write_bytes(data)
    return path


def named(data: bytes) -> set[str]:
    return foreign.named_globals(io.BytesIO(data))


def read_here(path: Path, out: Path) -> None:
    """What the child does with a checkpoint, in this process."""
    from safetensors.torch import save_file

    untrusted_child.read_checkpoint(str(path), str(out), torch, save_file)


@pytest.mark.parametrize("name", ATTACKS)
@pytest.mark.row("C11")
def test_names_in_a_pickle_are_refused_before_anything_is_read(name, tmp_path):
    data, name_in_pickle = foreign_files.attacks(tmp_path / "canary")[name]
    for torch_too in (False, True):
        with pytest.raises(foreign.Refused) as refused:
            foreign.check_names(named(data), torch_too=torch_too)
        assert name_in_pickle in str(refused.value)
        assert str(refused.value).isprintable()


@pytest.mark.row("C11")
@pytest.mark.parametrize("name", ATTACKS)
def test_the_second_lock_holds_without_the_first(name, tmp_path, monkeypatch):
    data, _ = foreign_files.attacks(tmp_path / "canary")[name]
    with pytest.raises((foreign.Refused, pickle.UnpicklingError)):
        foreign.PlainUnpickler(io.BytesIO(data)).load()
    monkeypatch.setattr(foreign, "check_names", lambda names, torch_too: None)
    path = file_of(tmp_path, foreign_files.torch_file(data), "model.ckpt")
    with pytest.raises((foreign.Refused, pickle.UnpicklingError)):
        read_here(path, tmp_path)
    assert not (tmp_path / "canary").exists()


def test_size_factors_that_run_a_command_are_not_read(tmp_path):
    canary = tmp_path / "canary"
    for name in ("a command", "protocol 0", "a name made while reading"):
        data, name_in_pickle = foreign_files.attacks(canary)[name]
        path = file_of(tmp_path, data)
        with pytest.raises(UntrustedFileError) as refused:
            read_pickle(path)
        assert str(refused.value).startswith(f"{path} was not read: its pickle asks for {name_in_pickle}")
    assert not canary.exists()
    assert issubclass(UntrustedFileError, CheckpointError)  # the command line turns it into exit code 2


@pytest.mark.row("C11")
def test_a_checkpoint_with_a_second_pickle_that_runs_a_command_is_not_read(tmp_path):
    canary = tmp_path / "canary"
    data, _ = foreign_files.attacks(canary)["a command"]
    innocent = pickle.dumps({"state_dict": {}}, protocol=2)
    path = file_of(tmp_path, foreign_files.torch_file(innocent, more={"extra/more.pkl": data}), "model.ckpt")
    with pytest.raises(UntrustedFileError, match=r"model.ckpt was not read: its pickle asks for posix.system"):
        read_checkpoint(path)
    assert not canary.exists()


def test_every_pickle_of_torchs_old_format_is_checked(tmp_path):
    honest = tmp_path / "old.ckpt"
    torch.save({"state_dict": {"a": torch.arange(3.0)}}, honest, _use_new_zipfile_serialization=False)
    names, mapped = untrusted_child.checkpoint_globals(str(honest))
    assert names == {"collections.OrderedDict", "torch.FloatStorage", "torch._utils._rebuild_tensor_v2"}
    assert not mapped
    read_here(honest, tmp_path)
    evil = tmp_path / "evil.ckpt"
    torch.save({"a": foreign_files.Call(compile, "ran")}, evil, _use_new_zipfile_serialization=False)
    with pytest.raises(foreign.Refused, match=r"builtins\.compile"):
        read_here(evil, tmp_path)


def test_names_that_only_resemble_torch_are_refused():
    for name in (
        "FloatStorage",
        "BFloat16Storage",
        "Size",
        "float32",
        "bfloat16",
        "_utils._rebuild_tensor_v2",
        "device",
    ):
        foreign.check_names({f"torch.{name}"}, torch_too=True)
    for name in (
        "load", "Tensor.data", "hub.load", "_utils._rebuild_device_tensor_from_numpy", "storage._load_from_bytes",
        "FloatStorage.from_file", "nn.modules.linear.Linear", "jit.load", "utils.data.DataLoader", "os.system",
    ):  # fmt: skip
        with pytest.raises(foreign.Refused, match=name):
            foreign.check_names({f"torch.{name}"}, torch_too=True)
    with pytest.raises(foreign.Refused):
        foreign.check_names({"torch.FloatStorage"}, torch_too=False)


def test_classes_of_upstream_become_data_and_their_modules_are_not_imported(tmp_path, monkeypatch):
    canary = tmp_path / "canary"
    for package in ("scldm", "scg_vae"):
        (tmp_path / package).mkdir()
        (tmp_path / package / "__init__.py").write_text(f"open({str(canary)!r}, 'w')")
    monkeypatch.setattr(untrusted, "_library_folders", lambda: [str(tmp_path)])
    state = b"}" + foreign_files.text("genes") + b"]" + foreign_files.text("A") + b"asb"
    for package in (b"scldm", b"scg_vae"):
        data = (
            b"\x80\x02}"
            + foreign_files.text("x")
            + b"c"
            + package
            + b".encoder\nVocabularyEncoder\n)\x81"
            + state
            + b"s."
        )
        value = read_pickle(file_of(tmp_path, data))
        assert value == {"x": {"(stand-in)": f"{package.decode()}.encoder.VocabularyEncoder", "genes": ["A"]}}
    assert not canary.exists()


def test_a_stand_in_called_with_anything_does_nothing(tmp_path):
    data = (
        b"\x80\x02cscldm.x\nrun\n" + foreign_files.text("touch") + b"\x85R}" + foreign_files.text("__reduce__")
        + b"K\x01sb."
    )  # fmt: skip
    foreign.check_names(named(data), torch_too=False)
    stand_in = foreign.PlainUnpickler(io.BytesIO(data)).load()
    assert (stand_in.name, stand_in.args, stand_in.state) == ("scldm.x.run", ("touch",), {"__reduce__": 1})
    assert foreign.Plain()(stand_in) == {"(stand-in)": "scldm.x.run", "__reduce__": 1}


def test_size_factors_with_numpys_numbers_are_read(tmp_path):
    factors = {
        "cell_type": {"A": np.float64(7.5), np.str_("B"): np.float32(0.25), "C": 3, "D": True, "E": np.int16(-2)},
        "array": np.array([[1.5, 2.5], [3.5, 4.5]]),
        "big-endian": np.array([1, 256], dtype=">i4"),
        "texts": np.array(["x", "yz"]),
        "objects": np.array(["x", 1.5], dtype=object),
        "not a number": float("nan"),
        7: (1, [2, {3}]),
    }
    expected = {
        "cell_type": {"A": 7.5, "B": 0.25, "C": 3, "D": True, "E": -2},
        "array": [1.5, 2.5, 3.5, 4.5],
        "big-endian": [1, 256],
        "texts": ["x", "yz"],
        "objects": ["x", 1.5],
        "not a number": "nan",
        "7": [1, [2, [3]]],
    }
    assert read_pickle(file_of(tmp_path, pickle.dumps(factors))) == expected
    for protocol in range(6):
        data = pickle.dumps(factors, protocol=protocol).replace(b"numpy._core", b"numpy.core")  # as numpy 1 wrote it
        if protocol < 4:  # from 4 on the length of a name is written before it
            foreign.check_names(named(data), torch_too=False)
            assert foreign.Plain()(foreign.PlainUnpickler(io.BytesIO(data)).load()) == expected


UNREADABLE = {
    "a persistent id": b"Psomewhere\n.",
    "a binary persistent id": b"\x80\x02K\x01Q.",
    "an extension number": foreign_files.extension(Path("canary")),
    "nothing": b"",
    "half a pickle": pickle.dumps({"a": {"b": 1.0}})[:-9],
    "no pickle": b"\x93NUMPY\x01\x00",
    "an instance without arguments": b"\x80\x02cnumpy._core.multiarray\nscalar\n)R.",
    "numbers of an unknown type": pickle.dumps({"a": np.array(["2020-01-01"], dtype="M8[D]")}),
}


@pytest.mark.parametrize("name", list(UNREADABLE))
def test_unreadable_files_are_an_error_and_not_a_crash(name, tmp_path):
    data = UNREADABLE[name]
    with pytest.raises(Exception) as error:
        untrusted_child.read_plain(str(file_of(tmp_path, data)), str(tmp_path))
    assert not isinstance(error.value, (RecursionError, MemoryError, SystemError))


def test_unreadable_and_missing_files_are_named(tmp_path):
    path = file_of(tmp_path, UNREADABLE["half a pickle"])
    with pytest.raises(UntrustedFileError, match=rf"^{path} was not read: it cannot be read \(ValueError"):
        read_pickle(path)
    with pytest.raises(UntrustedFileError, match=r"absent.pkl does not exist, or is not a file"):
        read_pickle(tmp_path / "absent.pkl")
    with pytest.raises(UntrustedFileError, match="is not a file"):
        read_checkpoint(tmp_path)


def test_a_pickle_that_computes_without_end_is_stopped(tmp_path):
    with pytest.raises(UntrustedFileError, match="it took more than 1 s of CPU time"):
        read_pickle(file_of(tmp_path, foreign_files.endless_hash()), seconds=1)


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"\x80\x02Nr\xff\xff\xff\x7f.", "takes more than 2048 MB"),  # a memo of 2^31 places
        (b"\x80\x02c__builtin__\nbytearray\nL99999999999L\n\x85R.", "takes more than 2048 MB"),
        (foreign_files.shared_text(), "File too large"),  # 125 GB as JSON
        (b"\x80\x02" + b"(" * 200_000 + b"t" * 200_000 + b".", "more than 100 levels"),
        (b"\x80\x02" + b"]" * 500 + b"a" * 499 + b".", "more than 100 levels"),
    ],
)
def test_a_short_pickle_that_expands_to_a_huge_value_is_refused(data, reason, tmp_path):
    with pytest.raises(UntrustedFileError, match=reason):
        read_pickle(file_of(tmp_path, data))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["size_factors.pkl"]


def test_values_shared_many_times_are_counted_each_time(monkeypatch):
    monkeypatch.setattr(foreign, "NODES", 10_000)
    with pytest.raises(foreign.Refused, match="more than 10,000 values"):
        foreign.Plain()(foreign.PlainUnpickler(io.BytesIO(foreign_files.shared_lists())).load())


def test_a_list_that_holds_itself_is_read():
    own: list = [1]
    own.append(own)
    assert foreign.Plain()(own) == [1, "(itself)"]


def test_a_pickle_that_unpacks_to_more_than_its_limit_is_not_unpacked(tmp_path, monkeypatch):
    monkeypatch.setattr(untrusted_child, "PICKLE_BYTES", 1 << 20)
    stored = file_of(tmp_path, foreign_files.torch_file(b"\x80\x02" + b"N0" * (1 << 20) + b"N."), "model.ckpt")
    bomb = foreign_files.zipped_again(stored, tmp_path / "bomb.ckpt")
    assert bomb.stat().st_size < 10_000
    with pytest.raises(foreign.Refused, match=r"archive/data.pkl in it has 2,097,156 bytes"):
        untrusted_child.checkpoint_globals(str(bomb))


def test_a_small_file_with_a_tensor_of_terabytes_is_refused(tmp_path):
    huge = torch.zeros(1).expand(1 << 20, 1 << 20)
    torch.save({"state_dict": {"a": huge}}, tmp_path / "model.ckpt")
    assert (tmp_path / "model.ckpt").stat().st_size < 2_000
    with pytest.raises(UntrustedFileError, match=r"model.ckpt was not read: .*4398046511104 bytes"):
        read_checkpoint(tmp_path / "model.ckpt")


def test_a_checkpoint_is_returned_as_tensors_and_plain_data(tmp_path):
    weights = torch.arange(6.0).view(2, 3)
    whole = {
        "epoch": 3,
        "state_dict": OrderedDict(a=weights, again=weights, turned=weights.T, half=weights.half(), none=weights[:0]),
        "hyper_parameters": argparse.Namespace(lr=0.1, table=defaultdict(list, {"x": [1]}), mean=np.float64(2.5)),
        "optimizer_states": [{"state": {0: weights}}, {}],
        "\x1b[2J": 1,
    }
    torch.save(whole, tmp_path / "stored.ckpt")
    found = read_checkpoint(foreign_files.zipped_again(tmp_path / "stored.ckpt", tmp_path / "model.ckpt"))
    assert found.about == {
        "epoch": 3,
        "hyper_parameters": {"(stand-in)": "argparse.Namespace", "lr": 0.1, "table": {"x": [1]}, "mean": 2.5},
        r"'\x1b[2J'": 1,
    }
    assert found.left == {"epoch": 0, "hyper_parameters": 0, "optimizer_states": 2, r"'\x1b[2J'": 0}
    assert {"argparse.Namespace", "collections.defaultdict"} <= set(found.stand_ins)
    assert found.state.keys() == whole["state_dict"].keys()
    for name, value in whole["state_dict"].items():
        assert torch.equal(found.state[name], value), name


def test_a_state_dict_holds_dense_tensors_under_printable_names(tmp_path):
    for state, reason in (
        ({"a": 1.0}, r"state_dict\['a'\] is a float; only dense tensors"),
        ({"a": torch.eye(2).to_sparse_coo()}, "asks for torch._utils._rebuild_sparse_tensor"),
        ({"a\nb": torch.zeros(1)}, r"a key 'a\\nb'; keys are printable"),
        ({7: torch.zeros(1)}, "a key 7; keys are printable"),
        ({}, "holds no state_dict"),
    ):
        torch.save({"state_dict": state}, tmp_path / "model.ckpt")
        with pytest.raises(foreign.Refused, match=reason):
            read_here(tmp_path / "model.ckpt", tmp_path)


@pytest.mark.row("S5")
def test_the_reader_sees_no_secrets_and_no_terminal(tmp_path, monkeypatch):
    started: dict = {}

    def run(command, **settings):
        started.update(settings, command=command)
        return subprocess.CompletedProcess(command, 1, b"", b"stopped here\n")

    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "canary")
    monkeypatch.setenv("PYTHONPATH", "/somewhere")
    monkeypatch.setattr(untrusted.subprocess, "run", run)
    with pytest.raises(UntrustedFileError, match=r"the reader ended with 1 .*: stopped here"):
        read_pickle(file_of(tmp_path, pickle.dumps({})))
    assert set(started["env"]) <= {"PATH", "LD_LIBRARY_PATH", "TMPDIR", "OMP_NUM_THREADS"}
    assert started["command"][:3] == [sys.executable, "-I", "-B"]
    assert started["stdin"] == subprocess.DEVNULL
