"""AdamW, optionally cautious: a coordinate moves only where the update agrees in sign with the gradient.

Cautious optimizers (Liang et al. 2024) divide the rest by the fraction of a tensor's coordinates that agree, so that
the mean step keeps its size. All arithmetic is in fused list operations without host synchronisation.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from scldm.optim.config import OptimizerConfig

MIN_AGREEMENT = 1e-3  # floor on the fraction, so that a tensor where nearly all disagree does not leap


class CautiousAdamW(torch.optim.Optimizer):
    """Implements AdamW (Loshchilov and Hutter 2019) with optional caution and AMSGrad.

    Args:
        params: Parameters or parameter groups.
        lr: Learning rate.
        betas: Decays of the two moments.
        eps: Added to the root of the second moment.
        weight_decay: Every step first scales parameters by 1 - lr * weight_decay.
        caution: Skip coordinates whose first moment disagrees in sign with the gradient (Liang et al. 2024).
        amsgrad: Divide by the largest second moment so far instead of the current one.
    """

    def __init__(
        self,
        params: Iterable[Tensor] | Iterable[dict[str, Any]],
        lr: float = 1e-3,
        *,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.01,
        caution: bool = True,
        amsgrad: bool = False,
    ):
        if not all(0 <= beta < 1 for beta in betas):
            raise ValueError(f"betas ({betas}) must be in [0, 1)")
        for name, value in (("lr", lr), ("eps", eps), ("weight_decay", weight_decay)):
            if value < 0:
                raise ValueError(f"{name} ({value}) must not be negative")
        defaults = {
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "caution": caution,
            "amsgrad": amsgrad,
        }
        super().__init__(params, defaults)

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Perform a single optimization step. Parameters without a gradient are skipped."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            params = [p for p in group["params"] if p.grad is not None]
            if params:
                self._update(params, group)
        return loss

    def _update(self, params: list[Tensor], group: dict[str, Any]) -> None:
        lr, (beta1, beta2) = group["lr"], group["betas"]
        states = [self._advance(p, amsgrad=group["amsgrad"]) for p in params]
        grads = [p.grad for p in params]
        first, second = [s["first"] for s in states], [s["second"] for s in states]
        torch._foreach_mul_(params, 1 - lr * group["weight_decay"])
        torch._foreach_lerp_(first, grads, 1 - beta1)
        torch._foreach_mul_(second, beta2)
        torch._foreach_addcmul_(second, grads, grads, 1 - beta2)
        if group["amsgrad"]:
            largest = [s["largest"] for s in states]
            torch._foreach_maximum_(largest, second)
            second = largest
        denominator = torch._foreach_sqrt(second)
        torch._foreach_div_(denominator, [math.sqrt(1 - beta2 ** s["step"]) for s in states])
        torch._foreach_add_(denominator, group["eps"])
        update = _masked(first, grads) if group["caution"] else first
        torch._foreach_addcdiv_(params, update, denominator, [-lr / (1 - beta1 ** s["step"]) for s in states])

    def _advance(self, p: Tensor, *, amsgrad: bool) -> dict[str, Any]:
        """Return a parameter's state, created on its first step, with its step count incremented."""
        state = self.state[p]
        if not state:
            state["step"] = 0
            state["first"] = torch.zeros_like(p)
            state["second"] = torch.zeros_like(p)
            if amsgrad:
                state["largest"] = torch.zeros_like(p)
        state["step"] += 1
        return state


def _masked(update: list[Tensor], grads: list[Tensor]) -> list[Tensor]:
    """Zero the update where it disagrees in sign with the gradient and rescale the rest by the fraction that agrees."""
    mask = torch._foreach_mul(update, grads)
    torch._foreach_sign_(mask)
    torch._foreach_clamp_min_(mask, 0.0)  # 1 where they agree
    agreement = torch._foreach_norm(mask, 1)  # the sum of a mask, per tensor
    torch._foreach_div_(agreement, [float(m.numel()) for m in mask])
    torch._foreach_clamp_min_(agreement, MIN_AGREEMENT)
    torch._foreach_div_(mask, agreement)
    torch._foreach_mul_(mask, update)
    return mask


def adamw(module: nn.Module, config: OptimizerConfig) -> torch.optim.Optimizer:
    """Build AdamW over the trainable parameters of a module: torch's fused one, or the cautious one if configured."""
    parameters = [p for p in module.parameters() if p.requires_grad]
    settings: dict[str, Any] = {"lr": config.lr, "betas": config.betas, "weight_decay": config.weight_decay}
    if config.cautious:
        return CautiousAdamW(parameters, **settings, caution=True)
    return torch.optim.AdamW(parameters, **settings, fused=True)
