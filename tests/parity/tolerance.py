"""Tolerances of the comparison with recorded numbers, and their reasons.

An error is the largest absolute difference; it is compared with `relative` times the largest recorded magnitude of that
tensor (so that sums over thousands of genes and gradients near 1e-3 are judged equally), and at least `floor`.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Tolerance:
    """Largest allowed error, as a share of the scale of the recorded tensor."""

    relative: float
    floor: float
    reason: str

    def at(self, scale: float) -> float:
        return max(self.relative * scale, self.floor)

    def with_rounding(self, single: Tensor, double: Tensor | None) -> Tolerance:
        """Widen the tolerance if upstream's single precision is off by more; `double` is the quantity in float64.

        An exponential or a softmax of large logits amplifies rounding by the size of the logits, in upstream as here.
        """
        if double is None or single.shape != double.shape:
            return self
        own = float((single.double() - double).abs().nan_to_num().max()) if single.numel() else 0.0
        return Tolerance(self.relative, max(self.floor, ROUNDING * own), self.reason)


ROUNDING = 8  # times upstream's own error: two independent roundings of a long sum seldom differ by more
EXACT = Tolerance(0.0, 0.0, "integers, ids and decisions are equal or wrong")
DOUBLE = Tolerance(1e-9, 1e-12, "float64 outputs: our order of summation differs from upstream's, nothing else")
DOUBLE_GRADIENT = Tolerance(1e-7, 1e-10, "float64 gradients: a backward pass through a dozen layers")
SINGLE = Tolerance(1e-5, 1e-6, "float32 outputs: rounding of another order of summation")
SINGLE_GRADIENT = Tolerance(1e-4, 1e-7, "float32 gradients: rounding adds up over a backward pass")
CLOSED_FORM = Tolerance(1e-9, 1e-12, "a formula of Python floats")
GUIDED = Tolerance(2e-5, 1e-6, "float32, and guidance multiplies the rounding of two outputs by its scale")
TRAJECTORY = Tolerance(5e-5, 1e-5, "float32 rounding carried through all steps of a solver")
ADAPTIVE = Tolerance(
    1e-4, 5e-5, "dopri5 at rtol = atol = 1e-5: rounding decides its steps, which differ within that tolerance"
)
STOCHASTIC = Tolerance(1e-4, 1e-4, "float32, divided by coefficients that vanish at the ends of the path")
