"""Whole numbers are divided exactly."""

from __future__ import annotations

import pytest

from pipeline.core.numbers import ceil_div


@pytest.mark.parametrize(
    ("a", "b", "expected"), [(0, 3, 0), (1, 3, 1), (3, 3, 1), (4, 3, 2), (10**17 + 1, 10, 10**16 + 1)]
)
def test_a_quotient_is_rounded_up_and_exact(a, b, expected):
    assert ceil_div(a, b) == expected
