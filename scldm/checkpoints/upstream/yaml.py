"""Upstream's Hydra configuration as data: interpolations are followed, nothing named in it is imported or run.

Only what is asked for is resolved. A value that calls a resolver (`${eval:…}`, `${oc.env:…}`) is left unread, and an
error if it is needed. `_target_` strings are names to compare, not things to import. The only module that knows
omegaconf.
"""

from __future__ import annotations

import io
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, TypeVar

import yaml
from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from scldm.checkpoints.native import CheckpointError

T = TypeVar("T")
MAX_BYTES, MAX_DEPTH, MAX_VALUES = 1 << 20, 40, 10_000  # upstream's own have 14 kB, 5 levels, 700 values
PACKAGES = ("scldm", "scg_vae")  # the second is what the first was called before its release
_ABSENT = object()
_REQUIRED: Any = object()


class UpstreamYaml:
    """Reads values by their dotted path and collects what is wrong, so that one error can say all of it."""

    def __init__(self, path: Path):
        self.path = path
        self.problems: list[str] = []
        self._calls: dict[str, str] = {}  # dotted path -> text that calls a resolver
        self._config = self._load(path)

    def value(self, at: str, kind: type[T], default: Any = _REQUIRED) -> T:
        """The value at a dotted path, of a given type; an absent one is `default`, or a problem.

        After a problem the return value is a stand-in of the type: ask `raise_problems` before using anything.
        """
        found, problem = self._select(at)
        if problem:
            self.problems.append(problem)
            return kind()
        if found is _ABSENT or (found is None and default is not _REQUIRED):
            if default is _REQUIRED:
                self.problems.append(f"{at} is missing")
                return kind()
            return default
        if kind is float and type(found) is int:
            found = float(found)
        if type(found) is not kind:
            self.problems.append(f"{at} must be {_english(kind)}; got {found!r}")
            return kind()
        return found

    def optional(self, at: str, kind: type[T]) -> T | None:
        """As `value`, but None where the value is absent, null or cannot be resolved: for what is only a hint."""
        found, problem = self._select(at)
        return found if not problem and type(found) is kind else None

    def mapping(self, at: str) -> dict[str, Any] | None:
        """A resolved dictionary, or None where it is absent or null."""
        found, problem = self._select(at)
        if problem:
            self.problems.append(problem)
        if problem or found is _ABSENT or found is None:
            return None
        if not isinstance(found, DictConfig):
            self.problems.append(f"{at} must be a dictionary; got {found!r}")
            return None
        try:
            resolved = OmegaConf.to_container(found, resolve=True, throw_on_missing=True)
        except OmegaConfBaseException as error:
            self.problems.append(f"{at} cannot be resolved: {str(error).splitlines()[0]}")
            return None
        assert isinstance(resolved, dict)
        return {str(key): value for key, value in resolved.items()}

    def keys(self, at: str) -> list[str]:
        """Names under a dictionary; empty where there is none."""
        found, _ = self._select(at)
        return [str(key) for key in found] if isinstance(found, DictConfig) else []

    def target(self, at: str, known: Mapping[str, T]) -> T | None:
        """What a `_target_` means: `known` maps the name without its package to anything but None."""
        name = self.value(f"{at}._target_", str)
        package, _, rest = name.partition(".")
        if package in PACKAGES and rest in known:
            return known[rest]
        if name:
            allowed = ", ".join(f"scldm.{n}" for n in known)
            self.problems.append(f"{at}._target_ is {name}; known here: {allowed} (and the same under scg_vae)")
        return None

    def only(self, at: str, keys: Collection[str]) -> None:
        """Every other key is a problem: a setting that is not understood might change the mathematics."""
        unknown = [k for k in self.keys(at) if k not in keys and not k.startswith("_")]
        if unknown:
            self.problems.append(f"{at} has settings that are not understood: {', '.join(unknown)}")

    def same(self, at: str, value: Any, *, like: str) -> None:
        """A setting that upstream repeats must say the same everywhere, because ours has it once."""
        before = len(self.problems)
        found = self.value(at, type(value), value)
        if found != value and len(self.problems) == before:
            self.problems.append(
                f"{at} is {found!r}, but {like} is {value!r}: a model with two values is not supported"
            )

    def raise_problems(self) -> None:
        if self.problems:
            raise CheckpointError(f"{self.path} cannot be used:\n  " + "\n  ".join(dict.fromkeys(self.problems)))

    def _select(self, at: str) -> tuple[Any, str]:
        """(value, "") or (anything, what went wrong)."""
        try:
            return OmegaConf.select(self._config, at, default=_ABSENT, throw_on_missing=True), ""
        except (OmegaConfBaseException, RecursionError) as error:
            if at in self._calls:
                return None, f"{at} is {self._calls[at]}: resolvers are not run; write the value into the file"
            why = (str(error).splitlines() or [type(error).__name__])[0]
            calls = "; ".join(f"{k}: {v}" for k, v in self._calls.items() if k in why)
            return None, f"{at} cannot be resolved: {why}" + (f" ({calls}: resolvers are not run)" if calls else "")

    def _load(self, path: Path) -> DictConfig:
        if not path.is_file():
            raise CheckpointError(f"{path} does not exist, or is not a file: the configuration of the checkpoint")
        if path.stat().st_size > MAX_BYTES:
            raise CheckpointError(
                f"{path} has {path.stat().st_size:,} bytes; a configuration has at most {MAX_BYTES:,}"
            )
        try:
            text = path.read_text(encoding="utf-8")
            _check_structure(path, text)
            loaded = OmegaConf.load(io.StringIO(text))
        except (yaml.YAMLError, OmegaConfBaseException, ValueError, RecursionError, OSError) as error:
            if isinstance(error, CheckpointError):
                raise
            why = " ".join(str(error).split()) or type(error).__name__
            raise CheckpointError(f"{path} is no configuration that can be read: {why[:300]}") from None
        if not isinstance(loaded, DictConfig):
            raise CheckpointError(f"{path} must hold a dictionary; got {type(loaded).__name__}")
        return OmegaConf.create(self._without_calls(OmegaConf.to_container(loaded, resolve=False), ""))

    def _without_calls(self, value: Any, at: str) -> Any:
        """The same with every text that calls a resolver marked as missing, and remembered."""
        if isinstance(value, dict):
            return {k: self._without_calls(v, f"{at}.{k}" if at else str(k)) for k, v in value.items()}
        if isinstance(value, list):
            return [self._without_calls(v, f"{at}[{i}]") for i, v in enumerate(value)]
        if isinstance(value, str) and calls_a_resolver(value):
            self._calls[at] = value
            return "???"
        return value


def _check_structure(path: Path, text: str) -> None:
    """Refuse what makes a short file expensive, or brings libyaml down: aliases, deep nesting, a million values."""
    depth = values = 0
    for event in yaml.parse(text, Loader=yaml.SafeLoader):
        if isinstance(event, yaml.AliasEvent):
            raise CheckpointError(f"{path} uses YAML aliases (*name): Hydra writes none, and they can grow without end")
        depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
        if depth > MAX_DEPTH:
            raise CheckpointError(f"{path} is nested more than {MAX_DEPTH} levels deep")
        values += isinstance(event, yaml.NodeEvent)
        if values > MAX_VALUES:
            raise CheckpointError(f"{path} has more than {MAX_VALUES:,} names and values")


def calls_a_resolver(text: str) -> bool:
    """Whether an interpolation in the text holds a colon: `${name:arguments}`, at any depth."""
    depth = i = 0
    while i < len(text):
        if text.startswith("${", i):
            depth, i = depth + 1, i + 1
        elif depth and text[i] == "}":
            depth -= 1
        elif depth and text[i] == ":":
            return True
        i += 1
    return False


def write_yaml(path: Path, config: Mapping[str, Any]) -> None:
    """A configuration that `UpstreamYaml` and upstream's Hydra read."""
    OmegaConf.save(OmegaConf.create(dict(config)), path)


def _english(kind: type) -> str:
    names = {int: "a whole number", float: "a number", bool: "true or false", str: "a text", ListConfig: "a list"}
    return names.get(kind, kind.__name__)
