"""Reads one foreign pickle in a process of its own. A script, run by `reader`; nobody imports it.

Input: a JSON object as the only argument. Output, in the folder it names: `tensors.safetensors` and `about.json`, or
`refused.json`. It imports torch and safetensors, and nothing of this package but `pickle_rules`, by its path.
"""

from __future__ import annotations

import importlib.util
import io
import json
import math
import resource
import sys
import zipfile
from pathlib import Path
from typing import Any

PICKLE_BYTES = 256 << 20  # the description of a checkpoint; its tensors lie outside


def beside(name: str) -> Any:
    """A module beside this script, loaded without its package."""
    spec = importlib.util.spec_from_file_location(name, Path(__file__).with_name(f"{name}.py"))
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


foreign = beside("pickle_rules")


def read_plain(path: str, out: str) -> None:
    with open(path, "rb") as f:
        data = f.read()
    stream = io.BytesIO(data)
    foreign.check_names(foreign.named_globals(stream), torch_too=False)
    if stream.read(1):
        raise foreign.Refused("more follows its pickle: it is no file of size factors")
    value = foreign.PlainUnpickler(io.BytesIO(data)).load()
    write_json(out, "about", {"value": foreign.Plain()(value)})


def read_checkpoint(path: str, out: str, torch: Any, save_file: Any) -> None:
    names, stored = checkpoint_globals(path)
    foreign.check_names(names, torch_too=True)
    replaced = sorted(n for n in names if foreign.is_stand_in(n))
    known = [(foreign.stand_in(n), n) for n in replaced] + [(foreign.MADE[n], n) for n in names & set(foreign.MADE)]
    with torch.serialization.safe_globals(known):
        whole = torch.load(path, map_location="cpu", weights_only=True, mmap=stored)
    if not isinstance(whole, dict):
        raise foreign.Refused(f"it holds a {type(whole).__name__}, not a dictionary")
    state = whole.get("state_dict", whole)
    if not isinstance(state, dict) or not state:
        raise foreign.Refused("it holds no state_dict")
    rest = {k: v for k, v in whole.items() if k != "state_dict"} if "state_dict" in whole else {}
    others = write_tensors(state, out, torch, save_file)
    large = ("optimizer_states", "lr_schedulers", "loops", "callbacks")
    about = {foreign.printable(k): foreign.Plain()(v) for k, v in rest.items() if k not in large}
    left = {foreign.printable(k): len(v) if isinstance(v, (dict, list)) else 0 for k, v in rest.items()}
    write_json(out, "about", {"about": about, "left": left, "same_memory": others, "stand_ins": replaced})


def checkpoint_globals(path: str) -> tuple[set[str], bool]:
    """Names in the pickles of a torch file, and whether its tensors can be mapped into memory.

    They can in a zip archive (what torch writes since 1.6) without compression: torch would take the compressed bytes
    of another archive for the numbers.
    """
    if zipfile.is_zipfile(path):
        names: set[str] = set()
        with zipfile.ZipFile(path) as archive:
            for entry in archive.infolist():
                if entry.filename.endswith(".pkl"):
                    if entry.file_size > PICKLE_BYTES:
                        raise foreign.Refused(f"{entry.filename} in it has {entry.file_size:,} bytes")
                    names |= foreign.named_globals(io.BytesIO(archive.read(entry)))
            return names, all(entry.compress_type == zipfile.ZIP_STORED for entry in archive.infolist())
    with open(path, "rb") as f:  # five pickles in a row, then the tensors
        return set().union(*(foreign.named_globals(f) for _ in range(5))), False


def write_tensors(state: dict[Any, Any], out: str, torch: Any, save_file: Any) -> dict[str, str]:
    """Write every tensor once; returns the names that share the memory of an earlier one, with that one's name."""
    first: dict[tuple[Any, ...], str] = {}  # place in memory -> name
    same: dict[str, str] = {}
    own: dict[str, Any] = {}
    for name, value in state.items():
        if not isinstance(name, str) or not name.isprintable() or len(name) > 1000:
            raise foreign.Refused(f"its state_dict has a key {foreign.printable(name)}; keys are printable names")
        if not isinstance(value, torch.Tensor) or value.layout != torch.strided:
            raise foreign.Refused(f"state_dict[{name!r}] is a {type(value).__name__}; only dense tensors are read")
        place = (value.data_ptr(), value.dtype, tuple(value.shape), value.stride(), name if not value.numel() else "")
        if place in first:
            same[name] = first[place]
        else:
            first[place] = name
            own[name] = value.detach().clone(memory_format=torch.contiguous_format)
    save_file(own, f"{out}/tensors.safetensors")
    return same


def write_json(out: str, name: str, value: Any) -> None:
    with open(f"{out}/{name}.json", "w") as f:
        json.dump(value, f)


def limit(memory: int, seconds: int, file_size: int) -> None:
    """From here on: this much more memory, no other process, no large file, no core dump."""
    with open("/proc/self/statm") as f:
        in_use = int(f.read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (in_use + memory,) * 2)
    so_far = resource.getrusage(resource.RUSAGE_SELF)
    last = math.ceil(so_far.ru_utime + so_far.ru_stime) + seconds
    resource.setrlimit(resource.RLIMIT_CPU, (last, last + 5))  # SIGXCPU at the first, SIGKILL at the second
    resource.setrlimit(resource.RLIMIT_FSIZE, (4 * file_size + (1 << 28),) * 2)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


def main() -> None:
    task = json.loads(sys.argv[1])
    sys.path.extend(task["paths"])
    libraries: tuple[Any, ...] = ()
    if task["kind"] == "checkpoint":  # before the limits: what the libraries take is not the file's doing
        import torch
        from safetensors.torch import save_file

        torch.set_num_threads(1)
        libraries = (torch, save_file)
    limit(task["memory"], task["seconds"], task["size"])
    try:
        if libraries:
            read_checkpoint(task["path"], task["out"], *libraries)
        else:
            read_plain(task["path"], task["out"])
    except foreign.Refused as error:
        write_json(task["out"], "refused", {"why": str(error)})
    except MemoryError:
        write_json(task["out"], "refused", {"why": f"reading it takes more than {task['memory'] >> 20} MB"})
    except Exception as error:
        lines = (str(error).splitlines() or ["no message"])[0]
        write_json(task["out"], "refused", {"why": f"it cannot be read ({type(error).__name__}: {lines[:300]})"})


if __name__ == "__main__":
    main()
