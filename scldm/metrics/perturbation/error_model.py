"""Predict how wrong an answer is for a combination that nobody measured, with an interval.

Errors of combinations that were left out are regressed on numbers that need no cell of the combination. There are few
combinations, so the regression is ridge with a penalty chosen by leaving one out, and the interval is jackknife+
(Barber, Candès, Ramdas and Tibshirani 2021): it takes the models that were fitted without each of the combinations, and
holds for any distribution of errors if combinations are exchangeable. With many combinations they are left out in
groups (CV+). With fewer than FEWEST no interval of this level exists; the range of the errors is given instead.

Which of two answers is better follows the regression of the logarithm of their ratio, but only where that was right
more often, on combinations that it had not seen, than naming the more frequent winner every time.

Shape letters: n combinations with a known error, p features, m combinations to predict.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

LEVEL = 0.9  # of the intervals
FEWEST = 9  # combinations: with fewer, the quantile that jackknife+ needs is beyond the largest error
GROUPS, LEFT_OUT_ALONE = 20, 60  # with more combinations than the latter they are left out in so many groups
PENALTIES = (*np.geomspace(1e-2, 1e3, 16).tolist(), np.inf)  # per combination; the last predicts the mean


@dataclass(frozen=True)
class Ridge:
    """A linear function of standardised features."""

    centre: np.ndarray  # (p,)
    scale: np.ndarray  # (p,)
    weights: np.ndarray  # (p,)
    intercept: float

    @classmethod
    def fit(cls, x: np.ndarray, y: np.ndarray) -> Ridge:
        """Fit to features x (n, p) and errors y (n,); the penalty has the least error over combinations left out.

        A feature that is not known of a combination (NaN) counts as the mean of the others.
        """
        known = np.isfinite(x)
        n_known = np.maximum(known.sum(0), 1)
        centre = np.where(known, x, 0).sum(0) / n_known
        z = np.where(known, x - centre, 0.0)
        scale = np.sqrt((z**2).mean(0))
        scale = np.where(scale > 1e-12, scale, np.inf)  # what does not vary says nothing
        u, s, vt = np.linalg.svd(z / scale, full_matrices=False)
        residual, n = y - y.mean(), len(y)
        projected = u.T @ residual
        best, best_error = np.zeros(len(s)), np.inf
        for penalty in PENALTIES:
            shrunk = s**2 / (s**2 + n * penalty)
            leverage = (u**2 @ shrunk) + 1 / n
            left_out = (residual - u @ (shrunk * projected)) / np.maximum(1 - leverage, 1e-6)
            error = float((left_out**2).sum())
            if error <= best_error:
                best, best_error = np.divide(shrunk, s, out=np.zeros_like(s), where=s > 1e-12), error
        return cls(centre, scale, vt.T @ (best * projected), float(y.mean()))

    def __call__(self, x: np.ndarray) -> np.ndarray:
        """Return the predicted errors of features (m, p), (m,)."""
        z = np.where(np.isfinite(x), x - self.centre, 0.0) / self.scale
        return self.intercept + z @ self.weights


@dataclass(frozen=True)
class Predicted:
    """Predicted errors and their intervals, (m,) each."""

    value: np.ndarray
    low: np.ndarray
    high: np.ndarray
    calibrated: bool  # False: too few combinations, and the interval is the range of their errors


@dataclass(frozen=True)
class ErrorModel:
    """Ridge regressions with and without each combination.

    Raises:
        ValueError: There are no combinations, or the arrays differ in length.
    """

    whole: Ridge
    parts: tuple[Ridge, ...]  # without each group
    group: np.ndarray  # (n,) of each combination
    residual: np.ndarray  # (n,) absolute error of the part that did not see the combination
    errors: np.ndarray  # (n,)

    @classmethod
    def fit(cls, x: np.ndarray, y: np.ndarray) -> ErrorModel:
        """Fit to features x (n, p) and errors y (n,) of combinations that were left out."""
        n = len(y)
        if x.shape[0] != n or not n:
            raise ValueError(
                f"features of {x.shape[0]} combinations, and errors of {n}; both need the same, at least 1"
            )
        group = np.arange(n) if n <= LEFT_OUT_ALONE else np.arange(n) % GROUPS
        if n < 2:
            return cls(Ridge.fit(x, y), (), group, np.full(n, np.nan), y)
        parts = tuple(Ridge.fit(x[group != k], y[group != k]) for k in range(group.max() + 1))
        seen = np.array([parts[k](x[i : i + 1])[0] for i, k in enumerate(group)])
        return cls(Ridge.fit(x, y), parts, group, np.abs(y - seen), y)

    @property
    def calibrated(self) -> bool:
        """Whether there are enough combinations for an interval of the level."""
        return len(self.errors) >= FEWEST

    def predict(self, x: np.ndarray) -> Predicted:
        """Predict the errors of combinations with features x (m, p)."""
        value = self.whole(x)
        if not self.calibrated:
            low, high = (np.full(len(x), edge) for edge in (self.errors.min(), self.errors.max()))
            return Predicted(value, np.minimum(low, value), np.maximum(high, value), calibrated=False)
        n = len(self.errors)
        above = int(np.ceil(LEVEL * (n + 1) - 1e-9))  # at most n
        each = np.stack([part(x) for part in self.parts])[self.group]  # (n, m)
        low = np.sort(each - self.residual[:, None], axis=0)[n - above]
        high = np.sort(each + self.residual[:, None], axis=0)[above - 1]
        return Predicted(value, np.minimum(low, value), np.maximum(high, value), calibrated=True)


def left_out_predictions(x: np.ndarray, y: np.ndarray) -> Predicted:
    """Predict the error of every combination by models that did not see it, (n,) each.

    The share of errors inside these intervals is their coverage. With many combinations they are left out in groups.

    Args:
        x: Features, (n, p).
        y: Errors, (n,).
    """
    n = len(y)
    value, low, high = (np.full(n, np.nan) for _ in range(3))
    calibrated = n > FEWEST
    for rows in _left_out_rows(n):
        found = ErrorModel.fit(x[~rows], y[~rows]).predict(x[rows])
        value[rows], low[rows], high[rows] = found.value, found.low, found.high
    return Predicted(value, low, high, calibrated)


def coverage(y: np.ndarray, predicted: Predicted) -> float:
    """Return the share of errors y (n,) inside their intervals; NaN without intervals."""
    known = np.isfinite(predicted.low)
    if not known.any():
        return float("nan")
    return float(((y >= predicted.low) & (y <= predicted.high))[known].mean())


@dataclass(frozen=True)
class Verdicts:
    """Which of two answers is better, for combinations that nobody measured."""

    better: np.ndarray  # (m,) bool: the first one
    by_features: bool  # False: the more frequent winner is named for all
    left_out: np.ndarray  # (n,) what the same rule, fitted without it, says of each known combination; NaN of one alone
    right: float  # share of the known combinations for which that is right; or NaN
    always: float  # the same, if the more frequent winner is named every time


def verdicts(x: np.ndarray, y: np.ndarray, asked: np.ndarray) -> Verdicts:
    """Name the better of two answers.

    Args:
        x: Features of combinations with known errors, (n, p), n at least 1.
        y: Log of the first answer's error over that of the second, (n,).
        asked: Features of the combinations that are asked for, (m, p).
    """
    better, by_features = _better(x, y, asked)
    said = np.full(len(y), np.nan)
    for rows in _left_out_rows(len(y)):
        said[rows] = _better(x[~rows], y[~rows], x[rows])[0]
    right = float("nan") if np.isnan(said).any() else float((said == (y < 0)).mean())
    share = float((y < 0).mean())
    return Verdicts(better, by_features, said, right, max(share, 1 - share))


def _better(x: np.ndarray, y: np.ndarray, asked: np.ndarray) -> tuple[np.ndarray, bool]:
    """Return whether the first answer is better, (m,), and whether features tell."""
    won = y < 0
    seen = np.full(len(y), np.nan)
    for rows in _left_out_rows(len(y)):
        seen[rows] = Ridge.fit(x[~rows], y[~rows])(x[rows])
    if ((seen < 0) == won).mean() > max(won.mean(), 1 - won.mean()):  # never of a single one, whose `seen` is NaN
        return Ridge.fit(x, y)(asked) < 0, True
    return np.full(len(asked), bool(won.mean() > 0.5)), False


def _left_out_rows(n: int) -> list[np.ndarray]:
    """Return which combinations are left out together, bool (n,) each; none of a single one."""
    group = np.arange(n) if n <= LEFT_OUT_ALONE else (np.arange(n) * GROUPS) // n
    return [group == k for k in range(group.max() + 1)] if n > 1 else []
