"""Items made ahead in a thread come in order, errors come through, and a caller that leaves ends the maker."""

from __future__ import annotations

import threading
import time

import pytest

from pipeline.overlap import ahead


def test_items_come_in_order_and_no_more_than_asked_wait():
    made = []

    def items():
        for i in range(20):
            made.append(i)
            yield i

    found = []
    for item in ahead(items(), 2):
        found.append(item)
        time.sleep(0.002)
        assert len(made) - len(found) <= 4  # two wait, one is in the maker's hand, one is made
    assert found == list(range(20))


def test_an_error_of_the_maker_is_raised_where_its_items_are_used():
    def items():
        yield 1
        raise KeyError("broken")

    made = ahead(items(), 1)
    assert next(made) == 1
    with pytest.raises(KeyError, match="broken"):
        next(made)


def test_a_caller_that_leaves_ends_the_thread():
    before = threading.active_count()
    for item in ahead(iter(range(1000)), 1):
        if item == 3:
            break
    deadline = time.monotonic() + 5
    while threading.active_count() > before and time.monotonic() < deadline:
        time.sleep(0.01)
    assert threading.active_count() == before
