"""Files that run something if they are unpickled, in every dress: each would make a file, the canary, if it could."""

from __future__ import annotations

import functools
import io
import os
import pickle
import tarfile
import warnings
import zipfile
import zlib
from pathlib import Path

import numpy as np
import torch

from helpers.files.foreign_files import Call, attacks, extension, text, torch_file


class Build:
    """Pickled as an object whose state is set by a call (BUILD with __setstate__)."""

    def __init__(self, command: str):
        self.command = command

    def __reduce__(self):
        return os.system, (self.command,), {"state": self.command}


def legacy_tar(pickled: bytes) -> bytes:
    """As torch wrote before 0.1.10: a tar of pickles."""
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as tar:
        for name in ("sys_info", "pickle", "storages", "tensors"):
            entry = tarfile.TarInfo(name)
            entry.size = len(pickled)
            tar.addfile(entry, io.BytesIO(pickled))
    return out.getvalue()


def array_of_objects(thing: object) -> bytes:
    """A `.npy` file whose elements are pickled."""
    out = io.BytesIO()
    np.save(out, np.array([thing, 1], dtype=object), allow_pickle=True)
    return out.getvalue()


def arrays_of_objects(thing: object) -> bytes:
    out = io.BytesIO()
    np.savez(out, state=np.array([thing], dtype=object))
    return out.getvalue()


def like_joblib(command: str) -> bytes:
    """A pickle of joblib's own wrapper of arrays, packed with zlib: `joblib.load` unpickles what follows it."""
    wrapper = b"\x80\x03cjoblib.numpy_pickle\nNumpyArrayWrapper\nq\x00)\x81q\x01}q\x02b"
    return zlib.compress(wrapper + b"cposix\nsystem\n" + text(command) + b"\x85R.")


def like_dill(command: str) -> bytes:
    """As dill writes a function: its code is made, then called."""
    return b"\x80\x02cdill._dill\n_create_function\n(cdill._dill\n_load_type\n" + text("CodeType") + b"\x85R" + (
        text(command) + b"tR)R."
    )  # fmt: skip


def like_cloudpickle(command: str) -> bytes:
    return b"\x80\x05ccloudpickle.cloudpickle\n_make_function\n(" + text(command) + b"NN}NtR)R."


def zero_shard(thing: object) -> bytes:
    """A shard of DeepSpeed's ZeRO, as `zero_pp_rank_0_mp_rank_00_optim_states.pt` is."""
    out = io.BytesIO()
    state = {"optimizer_state_dict": {"partition_count": 1, "base_optimizer_state": thing}, "ds_version": "0.19"}
    torch.save(state, out, pickle_protocol=2)
    return out.getvalue()


def legacy_torch(thing: object) -> bytes:
    out = io.BytesIO()
    torch.save({"state_dict": thing}, out, _use_new_zipfile_serialization=False)
    return out.getvalue()


def scripted(pickled: bytes) -> bytes:
    """As TorchScript: code beside the pickle."""
    return torch_file(pickled, more={"constants.pkl": pickled, "code/__torch__.py": b"import os\n"})


def zip_of_npy(pickled: bytes) -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as archive:
        archive.writestr("arr_0.npy", b"\x93NUMPY\x01\x00v\x00{'descr': '|O', 'fortran_order': False, 'shape': (1,), }"
                         + b" " * 58 + b"\n" + pickled)  # fmt: skip
    return out.getvalue()


def malicious(canary: Path) -> dict[str, bytes]:
    """Files by what they are."""
    touch = f"touch {canary}"
    call = Call(os.system, touch)
    plain = {f"pickle: {name}": data for name, (data, _) in attacks(canary).items()}
    reduced = pickle.dumps(call, protocol=2)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dressed = {
            "BUILD": pickle.dumps(Build(touch)),
            "an extension code": extension(canary),
            "a partial": pickle.dumps(functools.partial(os.system, touch)),
            "torch: zip": torch_file(reduced),
            "torch: legacy": legacy_torch(call),
            "torch: tar": legacy_tar(reduced),
            "torch: script": scripted(reduced),
            "torch: a shard of DeepSpeed": zero_shard(call),
            "numpy: npy": array_of_objects(call),
            "numpy: npz": arrays_of_objects(call),
            "numpy: npz by hand": zip_of_npy(reduced),
            "joblib": like_joblib(touch),
            "joblib, not packed": zlib.decompress(like_joblib(touch)),
            "dill": like_dill(touch),
            "cloudpickle": like_cloudpickle(touch),
        }
    return plain | dressed
