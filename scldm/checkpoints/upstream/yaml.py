"""Read upstream's Hydra configuration as data: interpolations are resolved, nothing named in it is imported or run.

Only requested values are resolved. A value that calls a resolver (`${eval:…}`, `${oc.env:…}`) is not read, and is an
error if it is needed. `_target_` strings are compared, never imported. Only this module imports omegaconf.
"""

from __future__ import annotations

import io
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, TypeVar

from scldm.errors import CheckpointError, extra

with extra("upstream"):
    import yaml
    from omegaconf import DictConfig, ListConfig, OmegaConf
    from omegaconf.errors import OmegaConfBaseException

T = TypeVar("T")
MAX_BYTES, MAX_DEPTH, MAX_VALUES = 1 << 20, 40, 10_000  # upstream's files have 14 kB, 5 levels, 700 values
PACKAGES = ("scldm", "scg_vae")  # the second is the name before the first release
_ABSENT = object()
_REQUIRED: Any = object()


class UpstreamYaml:
    """Reads values by their dotted path and collects problems, so that one error can report all of them."""

    def __init__(self, path: Path):
        self.path = path
        self.problems: list[str] = []
        self._calls: dict[str, str] = {}  # dotted path -> text that calls a resolver
        self._config = self._load(path)

    def value(self, at: str, kind: type[T], default: Any = _REQUIRED) -> T:
        """Return the value at a dotted path, of a given type; an absent value is `default`, or a problem.

        After a problem the return value is a placeholder of the type: call `raise_problems` before using any value.
        """
        value, problem = self._select(at)
        if problem:
            self.problems.append(problem)
            return kind()
        if value is _ABSENT or (value is None and default is not _REQUIRED):
            if default is _REQUIRED:
                self.problems.append(f"{at} is missing")
                return kind()
            return default
        if kind is float and type(value) is int:
            value = float(value)
        if type(value) is not kind:
            self.problems.append(f"{at} must be {_english(kind)}; got {value!r}")
            return kind()
        return value

    def optional(self, at: str, kind: type[T]) -> T | None:
        """Return the value as `value` does, but None if it is absent, null or cannot be resolved: for hints."""
        value, problem = self._select(at)
        return value if not problem and type(value) is kind else None

    def mapping(self, at: str) -> dict[str, Any] | None:
        """Return a resolved dictionary, or None if it is absent or null."""
        value, problem = self._select(at)
        if problem:
            self.problems.append(problem)
        if problem or value is _ABSENT or value is None:
            return None
        if not isinstance(value, DictConfig):
            self.problems.append(f"{at} must be a dictionary; got {value!r}")
            return None
        try:
            resolved = OmegaConf.to_container(value, resolve=True, throw_on_missing=True)
        except OmegaConfBaseException as error:
            self.problems.append(f"{at} cannot be resolved: {str(error).splitlines()[0]}")
            return None
        assert isinstance(resolved, dict)
        return {str(key): value for key, value in resolved.items()}

    def keys(self, at: str) -> list[str]:
        """Return the names under a dictionary; none if it is absent."""
        value, _ = self._select(at)
        return [str(key) for key in value] if isinstance(value, DictConfig) else []

    def target(self, at: str, known: Mapping[str, T]) -> T | None:
        """Return the meaning of a `_target_`: `known` maps its name without the package to any value but None."""
        name = self.value(f"{at}._target_", str)
        package, _, rest = name.partition(".")
        if package in PACKAGES and rest in known:
            return known[rest]
        if name:
            allowed = ", ".join(f"scldm.{n}" for n in known)
            self.problems.append(f"{at}._target_ is {name}; known here: {allowed} (and the same under scg_vae)")
        return None

    def only(self, at: str, keys: Collection[str]) -> None:
        """Record every other key as a problem: a setting that is not understood might change the mathematics."""
        unknown = [k for k in self.keys(at) if k not in keys and not k.startswith("_")]
        if unknown:
            self.problems.append(f"{at} has settings that are not understood: {', '.join(unknown)}")

    def same(self, at: str, value: Any, *, like: str) -> None:
        """Record a problem if a setting that upstream repeats has another value, because ours has it once."""
        before = len(self.problems)
        actual = self.value(at, type(value), value)
        if actual != value and len(self.problems) == before:
            self.problems.append(
                f"{at} is {actual!r}, but {like} is {value!r}: a model with two values is not supported"
            )

    def raise_problems(self) -> None:
        """Raise CheckpointError with all problems, if there are any."""
        if self.problems:
            raise CheckpointError(f"{self.path} cannot be used:\n  " + "\n  ".join(dict.fromkeys(self.problems)))

    def _select(self, at: str) -> tuple[Any, str]:
        """Return (value, "") or (anything, the problem)."""
        try:
            return OmegaConf.select(self._config, at, default=_ABSENT, throw_on_missing=True), ""
        except (OmegaConfBaseException, RecursionError) as error:
            if at in self._calls:
                return None, f"{at} is {self._calls[at]}: resolvers are not run; write the value into the file"
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            calls = "; ".join(f"{k}: {v}" for k, v in self._calls.items() if k in reason)
            return None, f"{at} cannot be resolved: {reason}" + (f" ({calls}: resolvers are not run)" if calls else "")

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
            reason = " ".join(str(error).split()) or type(error).__name__
            raise CheckpointError(f"{path} is not a readable configuration: {reason[:300]}") from None
        if not isinstance(loaded, DictConfig):
            raise CheckpointError(f"{path} must hold a dictionary; got {type(loaded).__name__}")
        return OmegaConf.create(self._without_calls(OmegaConf.to_container(loaded, resolve=False), ""))

    def _without_calls(self, value: Any, at: str) -> Any:
        """Return the value with every string that calls a resolver marked as missing, and remembered."""
        if isinstance(value, dict):
            return {k: self._without_calls(v, f"{at}.{k}" if at else str(k)) for k, v in value.items()}
        if isinstance(value, list):
            return [self._without_calls(v, f"{at}[{i}]") for i, v in enumerate(value)]
        if isinstance(value, str) and calls_a_resolver(value):
            self._calls[at] = value
            return "???"
        return value


def _check_structure(path: Path, text: str) -> None:
    """Refuse what makes a short file expensive, or crashes libyaml: aliases, deep nesting, a million values."""
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
    """Return whether an interpolation in the text holds a colon: `${name:arguments}`, at any depth."""
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
    """Write a configuration that `UpstreamYaml` and upstream's Hydra read."""
    OmegaConf.save(OmegaConf.create(dict(config)), path)


def _english(kind: type) -> str:
    names = {int: "a whole number", float: "a number", bool: "true or false", str: "a text", ListConfig: "a list"}
    return names.get(kind, kind.__name__)
