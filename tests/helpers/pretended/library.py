"""Builds `guard.cpp` and loads it, which must happen before torch is imported."""

from __future__ import annotations

import ctypes
import hashlib
import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path

SOURCE = Path(__file__).with_name("guard.cpp")
HEADER = "include/c10/core/impl/DeviceGuardImplInterface.h"


def torch_folder() -> Path:
    """Return the folder of the torch package, without importing it."""
    found = importlib.util.find_spec("torch")
    assert found is not None
    assert found.origin is not None
    return Path(found.origin).parent


def missing() -> str | None:
    """Return why a pretended CUDA device cannot be had here; None if it can."""
    if sys.platform != "linux":
        return f"a pretended CUDA device is built for Linux; this is {sys.platform}"
    if shutil.which("g++") is None:
        return "a pretended CUDA device needs g++ (apt-get install g++)"
    if not (torch_folder() / HEADER).is_file():
        return f"a pretended CUDA device needs torch's C++ headers; {torch_folder() / HEADER} is not there"
    if list((torch_folder() / "lib").glob("libtorch_cuda*")):
        return (
            "a pretended CUDA device needs torch's CPU build; this torch was built with CUDA and has hooks of its own"
        )
    return None


def build(folder: Path) -> Path:
    """Compile the guard into a folder; a second call finds the library of the first.

    Raises:
        RuntimeError: if g++ fails, with what it said.
    """
    torch = torch_folder()
    version = (torch / "version.py").read_bytes()
    library = folder / f"libguard-{hashlib.sha256(SOURCE.read_bytes() + version).hexdigest()[:12]}.so"
    if library.is_file():
        return library
    folder.mkdir(parents=True, exist_ok=True)
    partial = library.with_suffix(f".{os.getpid()}.tmp")
    includes = [f"-I{torch / 'include'}", f"-I{torch / 'include/torch/csrc/api/include'}"]
    command = ["g++", "-shared", "-fPIC", "-O1", "-std=c++20", str(SOURCE), "-o", str(partial), *includes]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"the guard of the pretended CUDA device was not compiled: {done.stderr[-2000:]}")
    partial.replace(library)  # by rename: another process may build the same
    return library


def load(library: Path) -> None:
    """Load a built guard into this process, and import torch with it.

    `torch.inference_mode` becomes `no_grad` for the whole process: in it torch hands operations to the device whole,
    such as `linear`, and their parts would not be counted. Decorators take it where the package is imported.

    Raises:
        RuntimeError: if torch is imported already, and has looked for hooks of CUDA.
    """
    if "torch" in sys.modules:
        raise RuntimeError("the guard of the pretended CUDA device must be loaded before torch is imported")
    folder = torch_folder() / "lib"
    for name in (*sorted(folder.glob("libgomp*")), folder / "libc10.so", folder / "libtorch_cpu.so", library):
        ctypes.CDLL(str(name), mode=ctypes.RTLD_GLOBAL)
    import torch

    torch.inference_mode = lambda mode=True: torch.no_grad()  # type: ignore[assignment, misc]
