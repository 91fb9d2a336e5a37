"""What is handed over is done in order in one thread, errors come through, and nothing outlives the caller."""

from __future__ import annotations

import threading
import time

import pytest

from pipeline.inference.background import Behind


def test_things_are_done_in_order_by_another_thread_and_few_wait():
    done, threads = [], set()

    def deal_with(i: int) -> None:
        time.sleep(0.002)
        done.append(i)
        threads.add(threading.get_ident())

    with Behind(2) as behind:
        for i in range(20):
            behind.do(deal_with, i)
            assert i + 1 - len(done) <= 2
    assert done == list(range(20))
    assert len(threads) == 1
    assert threading.get_ident() not in threads


def test_an_error_comes_to_who_hands_over_next():
    failed = threading.Event()

    def fail() -> None:
        failed.set()
        raise KeyError("broken")

    with pytest.raises(KeyError, match="broken"), Behind(4) as behind:  # noqa: PT012
        behind.do(fail)
        failed.wait(5)
        time.sleep(0.05)
        behind.do(print)
        pytest.fail("the error was not raised")


def test_an_error_of_the_last_thing_is_raised_on_leaving():
    def fail() -> None:
        raise KeyError("broken")

    with pytest.raises(KeyError, match="broken"), Behind(4) as behind:
        behind.do(fail)


def test_an_error_of_the_caller_drops_what_has_not_begun_and_ends_the_thread():
    before, done = threading.active_count(), []
    with pytest.raises(ValueError, match="mine"), Behind(4) as behind:  # noqa: PT012
        behind.do(time.sleep, 0.2)
        behind.do(done.append, 1)
        raise ValueError("mine")
    assert done == []
    assert threading.active_count() == before
