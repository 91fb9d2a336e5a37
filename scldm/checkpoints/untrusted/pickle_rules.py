"""Rules for untrusted pickles: names that are allowed, and inert objects in place of foreign ones.

Standard library only. Plain containers and tensors are constructed; every class of a foreign package becomes a
`StandIn`, which keeps its arguments and state and does nothing; any other name is refused before anything is read. The
child process of `reader` loads this file by its path: it does not import this package, so that a pickle that names
`scldm.something` cannot reach our code.
"""

from __future__ import annotations

import _compat_pickle
import codecs
import collections
import math
import pickle
import pickletools
import re
import struct
from collections.abc import Callable, Iterable
from typing import IO, Any

NODES = 5_000_000  # values of the returned description: shared references can expand to many more than the file holds
CONSTRUCTED: dict[str, Callable[..., Any]] = {
    "_codecs.encode": codecs.encode,
    "collections.OrderedDict": collections.OrderedDict,
    "collections.Counter": collections.Counter,
    **{f"builtins.{t.__name__}": t for t in (dict, list, tuple, set, int, float, bool, str, bytearray, complex)},
}
TORCH = re.compile(
    r"torch\.(\w+Storage|Size|device|Tensor|nn\.parameter\.Parameter|storage\.(Untyped|Typed)Storage"
    r"|(b?float|u?int|complex|float8_\w+)\d*|half|double|long|short|bool|_utils\._rebuild_(tensor(_v2)?|parameter))"
)
STAND_IN_PACKAGES = {"scldm", "scg_vae", "omegaconf", "hydra", "pytorch_lightning", "lightning", "lightning_fabric"}
STAND_IN_PACKAGES |= {"pandas", "pyarrow", "pathlib", "argparse", "datetime", "uuid", "typing", "torchmetrics"}
STAND_IN = re.compile(r"functools\.partial|builtins\.(object|slice)|copyreg\._reconstructor|torch\.optim\..+")
NUMPY = re.compile(r"numpy\.(dtype|ndarray|dtypes\.\w+|(_core|core)\.(multiarray|numeric)\.\w+)")
NUMBERS = {"b1": "?", "f2": "e", "f4": "f", "f8": "d"} | dict(zip(["i1", "i2", "i4", "i8"], "bhiq", strict=True))
NUMBERS |= dict(zip(["u1", "u2", "u4", "u8"], "BHIQ", strict=True))


class Refused(Exception):
    """Raised for a file that is not read. The message is reported by the parent process."""


class StandIn:
    """An inert object in place of an object of a foreign package."""

    name = ""  # of the class that it stands for
    args: tuple[Any, ...]
    state: Any

    def __new__(cls, *args: Any, **kwargs: Any) -> Any:
        self = object.__new__(cls)
        self.args, self.state = args, None
        return self

    def __init__(self, *args: Any, **kwargs: Any):
        pass

    def __setstate__(self, state: Any) -> None:
        self.state = state


class PlainDict(StandIn):
    """Reads subclasses of dict (defaultdict, AttributeDict) as a plain dict."""

    def __new__(cls, *args: Any, **kwargs: Any) -> Any:
        return {}


def printable(name: Any) -> str:
    """Return a foreign name in printable form: one line, limited in length, no escape sequences."""
    text = name if isinstance(name, str) and name.isprintable() else ascii(name)
    return text if len(text) <= 200 else f"{text[:200]}…"


def stand_in(name: str) -> type[StandIn]:
    """Return a subclass of StandIn for a foreign name."""
    kind = PlainDict if name.endswith((".defaultdict", ".AttributeDict")) else StandIn
    return type("StandInFor_" + re.sub(r"\W", "_", name), (kind,), {"name": name})


def is_stand_in(name: str) -> bool:
    """Return whether a name is replaced by a stand-in."""
    package = name.partition(".")[0]
    whole = name == "collections.defaultdict" or package in STAND_IN_PACKAGES
    return whole or bool(STAND_IN.fullmatch(name) or NUMPY.fullmatch(name))


def current_name(module: str, name: str) -> str:
    """Return the Python 3 name of a global."""
    if (module, name) in _compat_pickle.NAME_MAPPING:
        return ".".join(_compat_pickle.NAME_MAPPING[module, name])
    return f"{_compat_pickle.IMPORT_MAPPING.get(module, module)}.{name}"


def named_globals(stream: IO[bytes]) -> set[str]:
    """Return the names of everything that a pickle would import. Reads the instructions; runs none."""
    names: set[str] = set()
    memo: dict[Any, str | None] = {}
    pushed: tuple[str | None, str | None] = (None, None)  # the last two values on the stack, if they are strings
    for op, arg, _ in pickletools.genops(stream):
        if op.name in ("GLOBAL", "INST"):
            names.add(current_name(*str(arg).split(" ", 1)))
        elif op.name == "STACK_GLOBAL":
            module, name = pushed
            hidden = module is None or name is None
            names.add("a name that is computed while reading" if hidden else current_name(str(module), str(name)))
        if op.name in ("MEMOIZE", "PUT", "BINPUT", "LONG_BINPUT"):
            memo[len(memo) if op.name == "MEMOIZE" else arg] = pushed[1]
        elif op.name in ("GET", "BINGET", "LONG_BINGET"):
            pushed = (pushed[1], memo.get(arg))
        elif op.stack_after:
            pushed = (pushed[1], arg if isinstance(arg, str) else None)
        elif op.stack_before:  # a pop uncovers values that we do not keep
            pushed = (None, None)
    return names


def check_names(names: Iterable[str], *, torch_too: bool) -> None:
    """Refuse a pickle that names anything else than what is allowed here."""
    bad = sorted(
        n for n in names if n not in CONSTRUCTED and not is_stand_in(n) and not (torch_too and TORCH.fullmatch(n))
    )
    if bad:
        refused = ", ".join(map(printable, bad[:10]))
        raise Refused(f"its pickle asks for {refused}, which no upstream checkpoint needs; nothing was run")


def array_values(dtype: Any, data: Any) -> list[Any]:
    """Return the values of a numpy array or scalar from its stand-ins."""
    if not isinstance(dtype, StandIn) or not dtype.args:
        raise Refused("a numpy array without a known type")
    name = str(dtype.args[0]).lstrip("<>=|")
    order = "big" if dtype.state and dtype.state[1] == ">" else "little"
    if name[0] == "O":
        return list(data) if isinstance(data, list) else [data]
    if not isinstance(data, (bytes, bytearray)):
        raise Refused(f"a numpy array of type {name} whose data are {type(data).__name__}, not bytes")
    if name[0] == "U":
        width = max(4 * int(name[1:]), 1)
        parts = (data[i : i + width] for i in range(0, len(data), width))
        return [part.decode("utf-32-be" if order == "big" else "utf-32-le").rstrip("\0") for part in parts]
    if name not in NUMBERS:
        raise Refused(f"a numpy array of type {name}; known: O, U, {', '.join(sorted(NUMBERS))}")
    sign = ">" if order == "big" else "<"
    return [x[0] for x in struct.iter_unpack(sign + NUMBERS[name], data)]


class Plain:
    """Converts what was read to values that JSON can hold."""

    def __init__(self) -> None:
        self.nodes = 0

    def __call__(self, value: Any, open_objects: tuple[int, ...] = ()) -> Any:
        self.nodes += 1
        if self.nodes > NODES or len(open_objects) > 100:
            raise Refused(f"its description has more than {NODES:,} values, or more than 100 levels")
        if value is None or isinstance(value, (bool, int, str)):
            return value
        if isinstance(value, float):
            return value if math.isfinite(value) else str(value)
        if id(value) in open_objects:
            return "(itself)"
        inner = (*open_objects, id(value))
        if isinstance(value, dict):
            return {str(self(k, inner)): self(v, inner) for k, v in value.items()}
        if isinstance(value, (list, tuple, set)):
            return [self(v, inner) for v in value]
        if isinstance(value, StandIn):
            return self._stand_in(value, inner)
        return f"({type(value).__name__})"

    def _stand_in(self, value: StandIn, inner: tuple[int, ...]) -> Any:
        state = value.state
        if value.name.endswith("multiarray.scalar"):
            return self(array_values(*value.args)[0], inner)
        if NUMPY.fullmatch(value.name) and isinstance(state, tuple) and len(state) == 5:
            return self(array_values(state[2], state[4]), inner)
        if value.name.startswith("omegaconf.") and isinstance(state, dict):
            return self(state["_content"] if "_content" in state else state.get("_val"), inner)
        if value.name.startswith("pathlib."):
            return "/".join(str(a) for a in value.args).replace("//", "/")
        about: dict[str, Any] = {"(stand-in)": value.name}
        if isinstance(state, dict):
            about |= {str(k): self(v, inner) for k, v in state.items()}
        elif value.args:
            about["(arguments)"] = self(list(value.args), inner)
        return about


class PlainUnpickler(pickle.Unpickler):
    """Unpickles size factors: dictionaries, numbers, strings, numpy's numbers."""

    def find_class(self, module: str, name: str) -> Any:
        """Return a constructor or a stand-in for a name; raise `Refused` for any other."""
        full = current_name(module, name)
        check_names({full}, torch_too=False)
        return CONSTRUCTED[full] if full in CONSTRUCTED else stand_in(full)
