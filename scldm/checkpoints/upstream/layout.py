"""Split the state dict of an upstream checkpoint into parts; no key is lost.

    vae_model.NAME                    the VAE
    diffusion_model.NAME              the DiT's weights
    ema_model.online_model.NAME       the same again, as the average keeps them
    ema_model.ema_model.NAME          the DiT's averaged weights
    ema_model.{initted,step}          whether the average has begun, and its updates
    …_compiled._orig_mod.NAME         torch.compile's copy of the VAE or of the DiT

Every key is used, equal to one that is used, or an error that names it.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from scldm.errors import CheckpointError

# In order of preference: the first one that a checkpoint holds is used, and the others must be equal to it.
_HOMES = {
    "vae": ("vae_model.", "vae_model._orig_mod.", "vae_model_compiled._orig_mod.", "vae_model_compiled."),
    "dit": (
        "diffusion_model.",
        "diffusion_model._orig_mod.",
        "diffusion_model_compiled._orig_mod.",
        "diffusion_model_compiled.",
        "ema_model.online_model.",
        "ema_model.online_model._orig_mod.",
    ),
    "ema": ("ema_model.ema_model.", "ema_model.ema_model._orig_mod."),
}
_PREFIXES = sorted(((p, part) for part, homes in _HOMES.items() for p in homes), key=lambda x: -len(x[0]))
_COUNTERS = re.compile(r"ema_model\.(initted|step)")


@dataclass(frozen=True)
class UpstreamParts:
    """Weights by part, under upstream's names without prefix; empty if the checkpoint has no such part."""

    vae: dict[str, Tensor]
    dit: dict[str, Tensor]
    ema: dict[str, Tensor]
    ema_began: bool | None  # None: the checkpoint does not say
    ema_step: int | None
    equal: dict[str, str] = field(default_factory=dict)  # key -> the key that was used instead


def split_state_dict(state: Mapping[str, Tensor]) -> UpstreamParts:
    """Sort a checkpoint's state dict into parts.

    Raises:
        CheckpointError: Keys have no known layout, or copies differ from the original in values or names; the message
            lists all of them.
    """
    found: dict[str, dict[str, dict[str, Tensor]]] = {part: {} for part in _HOMES}  # part -> prefix -> name -> value
    counters: dict[str, Tensor] = {}
    unknown = []
    for key, value in state.items():
        if match := _COUNTERS.fullmatch(key):
            counters[match[1]] = value
        elif home := next(((p, part) for p, part in _PREFIXES if key.startswith(p)), None):
            found[home[1]].setdefault(home[0], {})[key.removeprefix(home[0])] = value
        else:
            unknown.append(key)
    problems = [f"no upstream layout has a key {key!r}" for key in unknown[:20]]
    problems += [f"… and {len(unknown) - 20} more such keys"] if len(unknown) > 20 else []
    equal: dict[str, str] = {}
    parts = {part: _one_of(homes, found[part], equal, problems) for part, homes in _HOMES.items()}
    problems += [
        f"{part}: {name} {reason}"
        for part, values in parts.items()
        for name, value in values.items()
        if (reason := _unusable(value))
    ]
    problems += [f"ema_model.{k} has {v.numel()} values, not one" for k, v in counters.items() if v.numel() != 1]
    problems += [
        f"ema_model.{k} is {v.dtype}, not a whole number"
        for k, v in counters.items()
        if v.is_floating_point() or v.is_complex()
    ]
    if problems:
        raise CheckpointError("the checkpoint cannot be used:\n  " + "\n  ".join(problems))
    began = counters.get("initted")
    step = counters.get("step")
    return UpstreamParts(
        **parts,
        ema_began=None if began is None else bool(began.item()),
        ema_step=None if step is None else int(step.item()),
        equal=equal,
    )


def _one_of(
    homes: tuple[str, ...], found: Mapping[str, dict[str, Tensor]], equal: dict[str, str], problems: list[str]
) -> dict[str, Tensor]:
    """Return the first copy of a part; record keys of the others in `equal`, and differences in `problems`."""
    present = [home for home in homes if home in found]
    if not present:
        return {}
    first = present[0]
    used = found[first]
    for other in present[1:]:
        copy = found[other]
        problems += [f"{first}{n} has no copy under {other}" for n in sorted(used.keys() - copy.keys())[:10]]
        problems += [f"{other}{n} has no original under {first}" for n in sorted(copy.keys() - used.keys())[:10]]
        for name in used.keys() & copy.keys():
            if reason := _difference(used[name], copy[name]):
                problems.append(f"{other}{name} should be a copy of {first}{name}, but {reason}")
            else:
                equal[other + name] = first + name
    return used


def _unusable(value: Tensor) -> str:
    """Return why a tensor cannot be a weight, or "".

    Weights are kept in single precision, and must be finite there.
    """
    if not value.is_floating_point():
        return f"is of type {value.dtype}; weights are floating-point numbers"
    return "" if value.float().isfinite().all() else "holds values that are not finite"


def _difference(a: Tensor, b: Tensor) -> str:
    """Return how two tensors differ, or ""."""
    if a.shape != b.shape:
        return f"one is {tuple(b.shape)}, the other {tuple(a.shape)}"
    if a.dtype != b.dtype:
        return f"one is {b.dtype}, the other {a.dtype}"
    if torch.equal(a.double(), b.double()):  # not every type can be compared as it is
        return ""
    return f"they differ by up to {(a.double() - b.double()).abs().max().item():.3g}"
