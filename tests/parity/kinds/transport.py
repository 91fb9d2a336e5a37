"""Recorded probability paths: coefficients, conversions, training targets and losses, and the ends of time."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

import torch

from parity.case import Case, CaseError
from parity.ledger import Ledger
from parity.tolerance import CLOSED_FORM, SINGLE
from scldm.flow.config import PathConfig
from scldm.flow.objective import flow_loss, to_noise, to_score, to_velocity
from scldm.flow.path import PATHS, sample_path, sampling_interval, times_like, training_interval
from scldm.flow.sde import SDEOptions, diffusion, sde_interval

PATH_NAMES = {"Linear": "linear", "GVP": "gvp", "VP": "vp"}
DIFFUSION_NAMES = {
    "SBDM": "sbdm",
    "constant": "constant",
    "sigma": "sigma",
    "linear": "linear",
    "decreasing": "decreasing",
    "inccreasing-decreasing": "increasing_decreasing",  # upstream's spelling
}


def matches(case: Case) -> bool:
    return "intervals" in case.facts and "eps_rules" in case.facts


def toy_field(case: Case) -> Any:
    """The small network of the recordings: tanh(x W) + t b - 0.3 x."""
    weight, bias = case.tensors["in/W"], case.tensors["in/b"]
    return lambda x, t: torch.tanh(x @ weight) + times_like(t, x) * bias - 0.3 * x


def path_config(upstream_path: str, prediction: str, weight: str = "none") -> PathConfig:
    """Ours for upstream's names. Upstream ignores the weight of a velocity prediction; ours refuses it."""
    if upstream_path not in PATH_NAMES:
        raise CaseError(f"no path {upstream_path!r}; known are {', '.join(PATH_NAMES)}")
    weight = "none" if prediction == "velocity" else weight.lower()
    return PathConfig.model_validate({"path": PATH_NAMES[upstream_path], "prediction": prediction, "weight": weight})


def check(case: Case, ledger: Ledger) -> None:
    for name in sorted({key.split("/")[0] for key in case.under("coef/")}):
        _check_coefficients(case, ledger, name)
    for training_case in ledger.fact("cases"):
        _check_training(case, ledger, training_case)
    for name, rule in ledger.fact("eps_rules").items():
        _check_eps(ledger, name, rule)
    for name, intervals in ledger.fact("intervals").items():
        for arguments, recorded in intervals.items():
            _check_interval(ledger, name, json.loads(arguments), recorded)


def _check_coefficients(case: Case, ledger: Ledger, name: str) -> None:
    recorded, root = case.under(f"coef/{name}/"), f"coef/{name}"
    t, x, v = (ledger.given(f"{root}/{key}") for key in ("t", "x", "velocity"))
    config = path_config(name, "velocity")
    path, times = PATHS[config.path], times_like(t, x)
    score = path_config(name, "score")
    ours = {
        **{key: getattr(path, key)(t) for key in ("alpha", "d_alpha", "sigma", "d_sigma")},
        "d_alpha_alpha_ratio": path.d_log_alpha(t),
        "drift_mean": -path.d_log_alpha(times) * x,
        "drift_var": path.score_weight(times),
        "score_from_velocity": to_score(v, x, t, config),
        "noise_from_velocity": to_noise(v, x, t, config),
    }
    if "score_from_velocity" in recorded:
        ours["velocity_from_score"] = to_velocity(recorded["score_from_velocity"], x, t, score)
    for key in recorded:
        if match := re.fullmatch(r"diffusion_(.+)_norm([\d.]+)", key):
            if match[1] not in DIFFUSION_NAMES:
                continue  # reported as not understood
            options = SDEOptions(diffusion=DIFFUSION_NAMES[match[1]], norm=float(match[2]))  # type: ignore[arg-type]
            value = diffusion(times, options, config)
            # Upstream's constant diffusion is a number.
            ours[key] = value.flatten()[0] if recorded[key].ndim == 0 else value
    for key, value in ours.items():
        if key in recorded:
            ledger.tensor(f"{root}/{key}", value, SINGLE)


def _check_training(case: Case, ledger: Ledger, facts: Mapping[str, Any]) -> None:
    match = re.fullmatch(r"train/([^/]+)/(velocity|score|noise)/([^/]+)/[^/]+", facts["key"])
    if not match:
        ledger.unknown(facts["key"], "not of the form train/PATH/PREDICTION/WEIGHT/EPS")
        return
    config, shared = path_config(match[1], match[2], match[3]), facts["shared"]
    t, x0, x1 = ledger.given(f"{shared}t"), ledger.given(f"{shared}x0"), case.tensors["in/x1"]
    sample = sample_path(x0, x1, t, config.path)
    if not any(row.quantity == f"{shared}xt" for row in ledger.rows):  # shared by the weights of a path
        _check_draws(case, ledger, shared, config, facts["train_eps"])
        ledger.tensor(f"{shared}xt", sample.x_t, SINGLE)
        ledger.tensor(f"{shared}ut", sample.velocity, SINGLE)
        ledger.tensor(f"{shared}pred", toy_field(case)(sample.x_t, t), SINGLE)
    loss = flow_loss(ledger.given(f"{shared}pred"), sample, t, config)
    ledger.tensor(f"{facts['key']}/loss", loss, SINGLE)


def _check_draws(case: Case, ledger: Ledger, shared: str, config: PathConfig, train_eps: float) -> None:
    """Compare noise and times if the description has the seed; otherwise use them as given."""
    match = re.search(r"torch\.manual_seed\((\d+)\)", case.facts.get("note", ""))
    if match:
        generator, x1 = torch.Generator().manual_seed(int(match[1])), case.tensors["in/x1"]
        ledger.tensor(f"{shared}x0", torch.randn(x1.shape, generator=generator), SINGLE)
        t0, t1 = training_interval(config, eps=train_eps)
        ledger.tensor(f"{shared}t", torch.rand(len(x1), generator=generator) * (t1 - t0) + t0, SINGLE)


def _rule_name(name: str) -> tuple[PathConfig, float | None, float | None]:
    """Path, and the training and sampling eps that upstream was given, from a key of eps_rules or intervals."""
    match = re.fullmatch(r"([^/]+)/([^/]+)/train_eps=([^/]+)/sample_eps=([^/]+)", name)
    if not match:
        raise CaseError(f"{name!r} is not of the form PATH/PREDICTION/train_eps=E/sample_eps=E")
    train, sample = (None if text == "None" else float(text) for text in match.groups()[2:])
    return path_config(match[1], match[2]), train, sample


def _distance_from_end(interval: tuple[float, float]) -> float:
    return 1 - interval[1]


def _check_eps(ledger: Ledger, name: str, rule: Mapping[str, float | None]) -> None:
    config, train, sample = _rule_name(name)
    ours = {
        "train_eps": _distance_from_end(training_interval(config, eps=train)),
        "sample_eps": _distance_from_end(sampling_interval(config, eps=sample)),
    }
    for key, recorded in rule.items():
        quantity = f"eps_rules/{name}/{key}"
        if recorded is None:
            reason = "upstream tests train_eps where it means sample_eps, and keeps None"
            ledger.fault(quantity, reason, f"{ours[key]:.6g}")
        else:
            ledger.value(quantity, ours[key], recorded, CLOSED_FORM)


def _check_interval(ledger: Ledger, name: str, arguments: Mapping[str, Any], recorded: Any) -> None:
    config, train, sample = _rule_name(name)
    quantity = f"intervals/{name}/{json.dumps(arguments)}"
    known = {"eval", "reverse", "sde", "last_step_size", "diffusion_form"}
    if unknown := sorted(set(arguments) - known):
        ledger.unknown(quantity, f"unknown arguments {unknown}")
        return
    if arguments.get("sde"):
        ours = sde_interval(_sde_options(arguments, config, sample if arguments.get("eval") else train), config)
    elif arguments.get("eval"):
        ours = sampling_interval(config, eps=sample)
    else:
        ours = training_interval(config, eps=train)
    if arguments.get("reverse"):
        ours = (1 - ours[0], 1 - ours[1])
    if isinstance(recorded, str) or None in recorded:
        ledger.fault(quantity, "upstream's sample_eps is None here", f"{ours[0]:.6g} to {ours[1]:.6g}")
    else:
        ledger.value(quantity, ours, recorded, CLOSED_FORM)


def _sde_options(arguments: Mapping[str, Any], config: PathConfig, eps: float | None) -> SDEOptions:
    # Upstream keeps no distance from the ends for a velocity on these paths, and then divides by zero.
    stable = config.prediction == "velocity" and config.path != "vp"
    return SDEOptions(
        eps=0.0 if stable else 1e-3 if eps is None else eps,
        diffusion=DIFFUSION_NAMES[arguments.get("diffusion_form", "SBDM")],  # type: ignore[arg-type]
        last_step_size=arguments.get("last_step_size", 0.0),
    )
