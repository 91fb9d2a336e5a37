"""Pickles that want to run something, put together by hand; each would make a file, the canary, if it could."""

from __future__ import annotations

import builtins
import functools
import importlib
import io
import operator
import os
import pickle
import subprocess
import zipfile
from pathlib import Path
from typing import Any

import torch


class Call:
    """Pickled as a call of `function`, whose result stands in this object's place."""

    def __init__(self, function: Any, *args: Any):
        self.function, self.args = function, args

    def __reduce__(self) -> tuple[Any, tuple[Any, ...]]:
        return self.function, self.args


class Apply(Call):
    """Pickled as a call of what another call gives."""

    def __reduce__(self) -> tuple[Any, tuple[Any, ...]]:
        return operator.call, (self.function, *self.args)


def text(value: str) -> bytes:
    """Instructions that push a text."""
    data = value.encode()
    return b"X" + len(data).to_bytes(4, "little") + data


def stack_global(module: bytes, name: bytes, command: str) -> bytes:
    """A call of what two things on the stack name."""
    return b"\x80\x04" + module + name + b"\x93" + text(command) + b"\x85R."


def rot13(value: str) -> bytes:
    """Instructions that put a text together while reading, with a function that is allowed."""
    return b"c_codecs\nencode\n" + text(value) + text("rot13") + b"\x86R"


def attacks(canary: Path) -> dict[str, tuple[bytes, str]]:
    """Pickles by what they try, each with a part of what a refusal must say."""
    touch = f"touch {canary}"
    code = f"open({str(canary)!r}, 'w')"
    partial = functools.partial(os.system, touch)
    made: dict[str, tuple[Any, str]] = {
        "a command": (Call(os.system, touch), "posix.system"),
        "a process": (Call(subprocess.Popen, ["touch", str(canary)]), "subprocess.Popen"),
        "eval": (Call(eval, code), "builtins.eval"),
        "exec": (Call(exec, code), "builtins.exec"),
        "an import": (Call(importlib.import_module, "antigravity"), "importlib.import_module"),
        "getattr": (
            Apply(Call(getattr, Call(__import__, "os"), "system"), touch),
            "builtins.__import__, builtins.getattr",
        ),
        "open": (Call(builtins.open, str(canary), "w"), "io.open"),
        "functools.partial": (Apply(partial), "posix.system"),
        "operator.methodcaller": (Apply(operator.methodcaller("touch"), canary), "operator.methodcaller"),
        "a nested pickle": (Call(pickle.loads, pickle.dumps(Call(os.system, touch))), "_pickle.loads"),
        "torch.load": (Call(torch.load, str(canary)), "torch.serialization.load"),
        "torch's loader of bytes": (Call(torch.storage._load_from_bytes, b""), "torch.storage._load_from_bytes"),
    }
    named = {name: (pickle.dumps(thing, protocol=4), asked) for name, (thing, asked) in made.items()}
    for protocol in range(6):
        named[f"protocol {protocol}"] = (pickle.dumps(Call(os.system, touch), protocol=protocol), "posix.system")
    system, posix = text("system"), text("posix")
    hidden = "a name that is computed while reading"
    by_hand = {
        "INST": (b"(S'" + touch.encode() + b"'\niposix\nsystem\n.", "posix.system"),
        "OBJ": (b"(cposix\nsystem\n" + text(touch) + b"o.", "posix.system"),
        "NEWOBJ": (b"\x80\x02csubprocess\nPopen\n" + text(touch) + b"\x85\x81.", "subprocess.Popen"),
        "Python 2's name": (b"cos\nsystem\n" + text(touch) + b"\x85R.", "os.system"),
        "Python 2's builtins": (b"c__builtin__\neval\n" + text(code) + b"\x85R.", "builtins.eval"),
        "an attribute of an allowed class": (b"\x80\x04ccollections\nCounter.__init__.x\n.", "Counter.__init__"),
        "a name made while reading": (stack_global(rot13("cbfvk"), rot13("flfgrz"), touch), hidden),
        "a name from the memo": (
            b"\x80\x04" + posix + b"q\x07" + system + b"q\x08" + text("collections") + text("OrderedDict")
            + b"h\x07h\x08\x93" + text(touch) + b"\x85R.",
            "posix.system",
        ),
        "a name under two others": (
            stack_global(posix, system + text("collections") + text("OrderedDict") + b"00", touch), hidden
        ),
        "a name that was doubled": (b"\x80\x04" + posix + b"2\x93" + text(touch) + b"\x85R.", hidden),
        "__setstate__": (
            b"\x80\x02ccollections\nOrderedDict\n)R}" + text("__setstate__") + b"cposix\nsystem\nsb"
            + text(touch) + b"b.",
            "posix.system",
        ),
        "a class that looks like torch's": (b"ctorch.hub\nload\n" + text("x") + b"\x85R.", "torch.hub.load"),
        "escape sequences": (b"c\x1b[2J\nsystem\n.", r"\x1b[2J.system"),
    }  # fmt: skip
    return named | by_hand


def extension(canary: Path) -> bytes:
    """A call by a number of copyreg's registry, which is empty."""
    return b"\x80\x02\x82\x01" + text(f"touch {canary}") + b"\x85R."


def torch_file(pickled: bytes, *, more: dict[str, bytes] | None = None) -> bytes:
    """A file as torch writes it, with a pickle of one's own."""
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as archive:
        archive.writestr("archive/data.pkl", pickled)
        archive.writestr("archive/byteorder", "little")
        archive.writestr("archive/version", "3\n")
        for name, content in (more or {}).items():
            archive.writestr(f"archive/{name}", content)
    return out.getvalue()


def zipped_again(path: Path, out: Path) -> Path:
    """The same torch file with compressed entries, as an archiver would pack it."""
    with zipfile.ZipFile(path) as old, zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED) as new:
        for entry in old.infolist():
            new.writestr(entry.filename, old.read(entry))
    return out


def endless_hash() -> bytes:
    """Sixty pairs, each of twice the last: two hundred bytes whose hash takes years."""
    pairs = b"".join(b"h" + bytes([i]) + b"h" + bytes([i]) + b"\x86q" + bytes([i + 1]) for i in range(60))
    return b"\x80\x04K\x01q\x00" + pairs + b"\x8f(h\x3c\x90."


def shared_lists() -> bytes:
    """Thirty lists, each of the last one ten times: 10^30 values."""
    lists = b"".join(b"](" + (b"h" + bytes([i])) * 10 + b"eq" + bytes([i + 1]) for i in range(30))
    return b"\x80\x02K\x01q\x00" + lists + b"."


def shared_text() -> bytes:
    """A text of half a megabyte, a quarter of a million times."""
    return b"\x80\x02" + text("a" * 500_000) + b"q\x00](" + b"h\x00" * 250_000 + b"e."
