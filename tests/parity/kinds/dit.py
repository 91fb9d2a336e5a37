"""Recorded DiTs: forward passes, guidance, a training step with its gradients, and the initial weights."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from parity.case import Case, CaseError
from parity.ledger import Ledger
from parity.tolerance import EXACT, GUIDED, SINGLE, SINGLE_GRADIENT, Tolerance
from scldm.checkpoints.upstream.names_dit import dit_key, dit_state_from_upstream
from scldm.flow.guidance import guided_prediction
from scldm.nn.config import DiTConfig
from scldm.nn.dit import DiT, sincos_positions, time_frequencies


def matches(case: Case) -> bool:
    return "state/t_embedder.mlp.0.weight" in case.tensors


def dit_config(values: Mapping[str, Any]) -> DiTConfig:
    """Our configuration from upstream's arguments of a DiT."""
    if values.get("norm_layer", "layernorm") != "layernorm":
        raise CaseError(f"config.norm_layer ({values['norm_layer']}): only layernorm is known")
    if values.get("dropout"):
        raise CaseError(f"config.dropout ({values['dropout']}): our DiT has none; only 0 is known")
    return DiTConfig(
        d_model=values["n_embed"],
        n_layers=values["n_layer"],
        n_heads=values["n_head"],
        strategy=values["condition_strategy"],
        bias=values["bias"],
        multiple_of=values["multiple_of"],
        eps=values["layernorm_eps"],
    )


def new_dit(values: Mapping[str, Any]) -> DiT:
    """A DiT of upstream's sizes, with fresh weights."""
    return DiT(
        dit_config(values),
        n_latent_tokens=values["seq_len"],
        latent_width=values["n_embed_input"],
        n_classes=values["class_vocab_sizes"],
    )


def recorded_dit(case: Case) -> DiT:
    """The DiT of a case, with its weights."""
    dit = new_dit(case.config)
    state = dit_state_from_upstream(case.under("state/"))
    for key, own in dit.state_dict().items():  # upstream makes no null class where it never drops a label
        if key.startswith("labels.") and key in state and len(state[key]) == len(own) - 1:
            state[key] = torch.cat([state[key], state[key].new_zeros(1, own.shape[1])])
    dit.load_state_dict(state)
    return dit.eval()


def check(case: Case, ledger: Ledger) -> None:
    dit = recorded_dit(case)
    x, t, conditions = case.tensors["in/x"], case.tensors["in/t"], case.under("in/cond/")
    with torch.no_grad():
        for key, ours in (("out/t_freq", time_frequencies), ("out/t_embed", dit.time)):
            if key in case.tensors:
                ledger.tensor(key, ours(t), SINGLE)
        for part in (_check_forward, _check_guidance):
            with ledger.part(part.__name__):
                part(case, ledger, dit, x, t, conditions)
    with ledger.part(_check_training.__name__):
        _check_training(case, ledger, dit, x, t, conditions)
    with ledger.part(_check_initial_weights.__name__):
        _check_initial_weights(case, ledger)
    for key in case.under("ref/"):
        if match := re.fullmatch(r"sincos_(\d+)x(\d+)", key):
            ledger.tensor(f"ref/{key}", sincos_positions(int(match[1]), int(match[2]))[0], SINGLE)


def _check_forward(
    case: Case, ledger: Ledger, dit: DiT, x: Tensor, t: Tensor, conditions: Mapping[str, Tensor]
) -> None:
    for key in case.under("out/forward"):
        name = f"out/forward{key}"
        if key == "":
            ledger.tensor(name, dit(x, t, conditions), SINGLE)
        elif key == "_null":
            ledger.tensor(name, dit(x, t, {}), SINGLE)
        elif (label := key.removeprefix("_only_")) in conditions:
            ledger.tensor(name, dit(x, t, {label: conditions[label]}), SINGLE)
        elif match := re.fullmatch(r"_(\w+_seed(\d+))", key):
            # Upstream draws one of several exclusive labels for the whole batch even when it is not training.
            label = drawn_label(conditions, seed=int(match[2]))
            ledger.same(f"{match[1]}.selected", label, ledger.fact(match[1])["selected"])
            ledger.tensor(name, dit(x, t, {label: conditions[label]}), SINGLE, f"upstream drew {label}")


def drawn_label(labels: Iterable[str], *, seed: int, generator: torch.Generator | None = None) -> str:
    """The one exclusive label that upstream keeps for a whole batch: an even draw among them in alphabetical order."""
    generator = generator or torch.Generator().manual_seed(seed)
    names = sorted(labels)
    return names[int(torch.randint(0, len(names), (), generator=generator))]


def _check_guidance(
    case: Case, ledger: Ledger, dit: DiT, x: Tensor, t: Tensor, conditions: Mapping[str, Tensor]
) -> None:
    """Upstream guides the second half of its batch and leaves the first unconditional."""
    n = len(x) // 2
    null = dit(x, t, {})
    half = {label: ids[n:] for label, ids in conditions.items()}

    def guided(scale: float | Mapping[str, float]) -> Tensor:
        # Upstream guides by the labels that have a scale; ours refuses a label without one.
        used = {k: v for k, v in half.items() if k in scale} if isinstance(scale, Mapping) else half
        return torch.cat([null[:n], guided_prediction(dit, used, scale=scale)(x[n:], t[n:])])

    for key in case.under("out/cfg/"):
        name = f"out/cfg/{key}"
        if key == "none":
            ledger.tensor(name, null, SINGLE)
        elif key == "mixed":
            scales = _one_scale_per(dit, ledger.fact("mixed_scale"))
            widest = max(map(abs, scales.values())) if isinstance(scales, Mapping) else scales
            ledger.tensor(name, guided(scales), _wide(GUIDED, max(3.0, widest)))
        elif match := re.fullmatch(r"w(-?[\d.]+)", key):
            ledger.tensor(name, guided(float(match[1])), _wide(GUIDED, float(match[1])))
    for key in case.under("out/cfg_joint_method/"):
        if match := re.fullmatch(r".+_scale(-?[\d.]+)", key):
            _check_joint_method(ledger, f"out/cfg_joint_method/{key}", dit, x, t, conditions, float(match[1]))
    if "forward_with_cfg_joint_error" in case.facts:
        error = ledger.fact("forward_with_cfg_joint_error")
        ledger.fault("forward_with_cfg_joint_error", f"upstream names one label in its code: {error}", "any label")


def _one_scale_per(dit: DiT, scales: Mapping[str, float]) -> float | Mapping[str, float]:
    """Joint conditions are guided by one scale, for which upstream takes the mean of those it is given."""
    return sum(scales.values()) / len(scales) if dit.strategy == "joint" else scales


def _check_joint_method(
    ledger: Ledger, name: str, dit: DiT, x: Tensor, t: Tensor, conditions: Mapping[str, Tensor], scale: float
) -> None:
    """Upstream's unused method: the whole batch guided. Of several exclusive labels it draws one, by no known seed."""
    options = [conditions] if dit.strategy == "joint" else [{label: ids} for label, ids in conditions.items()]
    guided = [guided_prediction(dit, option, scale=scale)(x, t) for option in options]
    recorded = ledger.given(name)
    chosen = min(range(len(guided)), key=lambda i: float((guided[i] - recorded).abs().max()))
    drawn = "" if len(options) == 1 else f"upstream drew {next(iter(options[chosen]))}"
    ledger.tensor(name, guided[chosen], _wide(GUIDED, scale), drawn)


def _wide(tolerance: Tolerance, scale: float) -> Tolerance:
    return Tolerance(tolerance.relative * max(1.0, abs(scale)), tolerance.floor, tolerance.reason)


def _check_training(
    case: Case, ledger: Ledger, dit: DiT, x: Tensor, t: Tensor, conditions: Mapping[str, Tensor]
) -> None:
    for key in case.under("out/train_seed"):
        facts, generator = ledger.fact("train"), torch.Generator().manual_seed(int(key))
        kept = list(conditions)
        if dit.strategy == "mutually_exclusive":
            kept = [drawn_label(conditions, seed=int(key), generator=generator)]
            ledger.same("train.selected", kept[0], facts.get("selected"))
        dropped = torch.rand(len(x), generator=generator) < case.config["cfg_dropout_prob"]
        ledger.tensor("out/train_drop_mask", dropped, EXACT)
        ids = {label: torch.where(dropped, dit.n_classes[label], conditions[label]) for label in kept}
        out = dit(x, t, ids)
        ledger.tensor(f"out/train_seed{key}", out, SINGLE)
        out.square().mean().backward()
        check_gradients(case, ledger, {dit_key(name): name for name in case.fact("grad_norm_names")}, dit)


def check_gradients(case: Case, ledger: Ledger, upstream_name: Mapping[str, str], dit: DiT) -> None:
    """Gradients under upstream's names, and their norms in its order."""
    gradients = {
        upstream_name[key]: torch.zeros_like(p) if p.grad is None else p.grad
        for key, p in dit.named_parameters()
        if key in upstream_name
    }
    for name in case.under("grad/"):
        ledger.tensor(f"grad/{name}", gradients[name], SINGLE_GRADIENT)
    norms = torch.stack([gradients[name].norm() for name in case.fact("grad_norm_names")])
    ledger.tensor("grad_norms", norms, SINGLE_GRADIENT)


def _check_initial_weights(case: Case, ledger: Ledger) -> None:
    """Which weights start at zero, exactly; how wide the others start, within five standard errors of two draws."""
    if "init" not in case.facts:
        return
    init = ledger.fact("init")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        dit = new_dit(case.config)
    zeros = {name for name, parameter in dit.named_parameters() if not parameter.any()}
    ledger.same("init.zeros", sorted(zeros), sorted(dit_key(name) for name in init["zeros"]))
    state = dit.state_dict()
    for name, std in init["std"].items():
        ours = state[dit_key(name)]
        expected_error = 5 * math.sqrt(2) * std / math.sqrt(2 * ours.numel())
        ledger.value(
            f"init.std/{name}", ours.std(), std, Tolerance(0, max(expected_error, 1e-6), "another random draw")
        )
