"""Submitted calls run in order in one thread, errors are raised, and no thread outlives the caller."""

from __future__ import annotations

import threading
import time

import pytest

from pipeline.inference.background import BackgroundWriter


def test_things_are_done_in_order_by_another_thread_and_few_wait():
    done, threads = [], set()

    def deal_with(i: int) -> None:
        time.sleep(0.002)
        done.append(i)
        threads.add(threading.get_ident())

    with BackgroundWriter(2) as writer:
        for i in range(20):
            writer.submit(deal_with, i)
            assert i + 1 - len(done) <= 2
    assert done == list(range(20))
    assert len(threads) == 1
    assert threading.get_ident() not in threads


def test_an_error_comes_to_who_hands_over_next():
    failed = threading.Event()

    def fail() -> None:
        failed.set()
        raise KeyError("broken")

    with pytest.raises(KeyError, match="broken"), BackgroundWriter(4) as writer:  # noqa: PT012
        writer.submit(fail)
        failed.wait(5)
        time.sleep(0.05)
        writer.submit(print)
        pytest.fail("the error was not raised")


def test_an_error_of_the_last_thing_is_raised_on_leaving():
    def fail() -> None:
        raise KeyError("broken")

    with pytest.raises(KeyError, match="broken"), BackgroundWriter(4) as writer:
        writer.submit(fail)


def test_an_error_of_the_caller_drops_what_has_not_begun_and_ends_the_thread():
    before, done = threading.active_count(), []
    with pytest.raises(ValueError, match="mine"), BackgroundWriter(4) as writer:  # noqa: PT012
        writer.submit(time.sleep, 0.2)
        writer.submit(done.append, 1)
        raise ValueError("mine")
    assert done == []
    assert threading.active_count() == before
