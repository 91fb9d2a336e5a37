"""Read one untrusted pickle in a process of its own. A script, run by `reader`; no module imports it.

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

PICKLE_BYTES = 256 << 20  # description of a checkpoint, without its tensors


def load_sibling(name: str) -> Any:
    """Load a module in the same folder as this script, without its package."""
    spec = importlib.util.spec_from_file_location(name, Path(__file__).with_name(f"{name}.py"))
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


rules = load_sibling("pickle_rules")


def read_plain(path: str, out: str) -> None:
    """Read a pickle of dictionaries and numbers (size factors) and write it as JSON."""
    with open(path, "rb") as f:
        data = f.read()
    stream = io.BytesIO(data)
    rules.check_names(rules.named_globals(stream), torch_too=False)
    if stream.read(1):
        raise rules.Refused("there are more data after its pickle: it is not a file of size factors")
    value = rules.PlainUnpickler(io.BytesIO(data)).load()
    write_json(out, "about", {"value": rules.Plain()(value)})


def read_checkpoint(path: str, out: str, torch: Any, save_file: Any) -> None:
    """Read a torch checkpoint and write its tensors as safetensors and the rest as JSON."""
    names, stored = checkpoint_globals(path)
    rules.check_names(names, torch_too=True)
    replaced = sorted(n for n in names if rules.is_stand_in(n))
    known = [(rules.stand_in(n), n) for n in replaced] + [
        (rules.CONSTRUCTED[n], n) for n in names & set(rules.CONSTRUCTED)
    ]
    with torch.serialization.safe_globals(known):
        whole = torch.load(path, map_location="cpu", weights_only=True, mmap=stored)
    if not isinstance(whole, dict):
        raise rules.Refused(f"it holds a {type(whole).__name__}, not a dictionary")
    state = whole.get("state_dict", whole)
    if not isinstance(state, dict) or not state:
        raise rules.Refused("it holds no state_dict")
    rest = {k: v for k, v in whole.items() if k != "state_dict"} if "state_dict" in whole else {}
    others = write_tensors(state, out, torch, save_file)
    large = ("optimizer_states", "lr_schedulers", "loops", "callbacks")
    about = {rules.printable(k): rules.Plain()(v) for k, v in rest.items() if k not in large}
    left = {rules.printable(k): len(v) if isinstance(v, (dict, list)) else 0 for k, v in rest.items()}
    write_json(out, "about", {"about": about, "left": left, "same_memory": others, "stand_ins": replaced})


def checkpoint_globals(path: str) -> tuple[set[str], bool]:
    """Return the names in the pickles of a torch file, and whether its tensors can be mapped into memory.

    They can in an uncompressed zip archive (what torch writes since 1.6): in a compressed one torch would take the
    compressed bytes for the numbers.
    """
    if zipfile.is_zipfile(path):
        names: set[str] = set()
        with zipfile.ZipFile(path) as archive:
            for entry in archive.infolist():
                if entry.filename.endswith(".pkl"):
                    if entry.file_size > PICKLE_BYTES:
                        raise rules.Refused(f"{entry.filename} in it has {entry.file_size:,} bytes")
                    names |= rules.named_globals(io.BytesIO(archive.read(entry)))
            return names, all(entry.compress_type == zipfile.ZIP_STORED for entry in archive.infolist())
    with open(path, "rb") as f:  # five pickles in a row, then the tensors
        return set().union(*(rules.named_globals(f) for _ in range(5))), False


def write_tensors(state: dict[Any, Any], out: str, torch: Any, save_file: Any) -> dict[str, str]:
    """Write every tensor once; return the names that share the memory of an earlier tensor, with its name."""
    first: dict[tuple[Any, ...], str] = {}  # place in memory -> name
    same: dict[str, str] = {}
    own: dict[str, Any] = {}
    for name, value in state.items():
        if not isinstance(name, str) or not name.isprintable() or len(name) > 1000:
            raise rules.Refused(f"its state_dict has a key {rules.printable(name)}; keys are printable names")
        if not isinstance(value, torch.Tensor) or value.layout != torch.strided:
            raise rules.Refused(f"state_dict[{name!r}] is a {type(value).__name__}; only dense tensors are read")
        place = (value.data_ptr(), value.dtype, tuple(value.shape), value.stride(), name if not value.numel() else "")
        if place in first:
            same[name] = first[place]
        else:
            first[place] = name
            own[name] = value.detach().clone(memory_format=torch.contiguous_format)
    save_file(own, f"{out}/tensors.safetensors")
    return same


def write_json(out: str, name: str, value: Any) -> None:
    """Write a value as NAME.json in the output folder."""
    with open(f"{out}/{name}.json", "w") as f:
        json.dump(value, f)


def limit(memory: int, seconds: int, file_size: int) -> None:
    """Limit this process: that much more memory, CPU time, no large file, no core dump."""
    with open("/proc/self/statm") as f:
        in_use = int(f.read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (in_use + memory,) * 2)
    so_far = resource.getrusage(resource.RUSAGE_SELF)
    last = math.ceil(so_far.ru_utime + so_far.ru_stime) + seconds
    resource.setrlimit(resource.RLIMIT_CPU, (last, last + 5))  # SIGXCPU at the first, SIGKILL at the second
    resource.setrlimit(resource.RLIMIT_FSIZE, (4 * file_size + (1 << 28),) * 2)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


def main() -> None:
    """Read the file of the task and write the result, or the reason for refusing it."""
    task = json.loads(sys.argv[1])
    sys.path.extend(task["paths"])
    libraries: tuple[Any, ...] = ()
    if task["kind"] == "checkpoint":  # before the limits: memory of the libraries is not the file's
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
    except rules.Refused as error:
        write_json(task["out"], "refused", {"reason": str(error)})
    except MemoryError:
        write_json(task["out"], "refused", {"reason": f"reading it takes more than {task['memory'] >> 20} MB"})
    except Exception as error:
        lines = (str(error).splitlines() or ["no message"])[0]
        write_json(task["out"], "refused", {"reason": f"it cannot be read ({type(error).__name__}: {lines[:300]})"})


if __name__ == "__main__":
    main()
