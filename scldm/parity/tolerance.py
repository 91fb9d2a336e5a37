"""How far from a recorded number ours may be, and why.

An error is the largest absolute difference; it is held against `relative` times the largest recorded magnitude of that
tensor (so that sums over thousands of genes and gradients near 1e-3 are judged alike), and at least `floor`.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Tolerance:
    """Largest error allowed, as a share of the scale of what was recorded."""

    relative: float
    floor: float
    reason: str

    def at(self, scale: float) -> float:
        return max(self.relative * scale, self.floor)


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
