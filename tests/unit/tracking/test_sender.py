"""The background thread delivers in order, never blocks its caller, and asks for a replay after anything was missed."""

from __future__ import annotations

import threading
import time

from pipeline.tracking.sender import BackgroundSender, NotReadyError


class Run:
    """A run whose records are also on disk, and whose server may be down or slow."""

    name = "a run"

    def __init__(self, *, down: bool = False, seconds: float = 0.0):
        self.down, self.seconds = down, seconds
        self.on_disk: list[int] = []
        self.got: list[int] = []
        self.replays = 0

    def deliver(self, records, *, replay):
        time.sleep(self.seconds)
        if self.down:
            raise ConnectionError("down")
        self.replays += replay
        numbers = [*self.on_disk, *(r["n"] for r in records)] if replay else [r["n"] for r in records]
        self.got += [n for n in dict.fromkeys(numbers) if n not in self.got]


def put(sender: BackgroundSender, run: Run, numbers) -> None:
    for n in numbers:
        run.on_disk.append(n)
        sender.put(run, {"n": n})


def wait_until(condition, seconds: float = 10.0) -> None:
    until = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < until
        time.sleep(0.01)


def test_records_arrive_in_order_without_a_replay():
    run, sender = Run(), BackgroundSender()
    put(sender, run, range(500))
    sender.close()
    assert run.got == list(range(500))
    assert run.replays == 0


def test_records_of_an_outage_arrive_by_replay_before_later_ones():
    run, sender = Run(down=True), BackgroundSender(retry_seconds=0.05)
    put(sender, run, range(500))
    time.sleep(0.1)
    run.down = False
    put(sender, run, range(500, 900))
    sender.close()
    assert run.got == list(range(900))


def test_a_server_that_comes_back_gets_what_it_missed_though_nothing_new_is_logged():
    run, sender = Run(down=True), BackgroundSender(retry_seconds=0.05)
    put(sender, run, range(10))
    time.sleep(0.2)
    run.down = False
    wait_until(lambda: run.got == list(range(10)))
    sender.close()


def test_closing_tries_once_more_without_waiting_for_the_next_retry():
    run, sender = Run(down=True), BackgroundSender(retry_seconds=3600)
    put(sender, run, range(10))
    time.sleep(0.1)
    run.down = False
    sender.close()
    assert run.got == list(range(10))


def test_one_run_that_fails_holds_up_no_other():
    broken, whole, sender = Run(down=True), Run(), BackgroundSender()
    for n in range(100):
        put(sender, broken, [n])
        put(sender, whole, [n])
    sender.close()
    assert whole.got == list(range(100))
    assert broken.got == []


def test_a_server_that_never_answers_blocks_neither_put_nor_close():
    run, sender = Run(seconds=60), BackgroundSender(capacity=100)
    began = time.monotonic()
    put(sender, run, range(1000))
    assert time.monotonic() - began < 0.5
    sender.close(0.5)
    assert time.monotonic() - began < 2


def test_records_that_do_not_fit_into_the_queue_arrive_by_replay():
    run, sender = Run(seconds=0.02), BackgroundSender(capacity=10)
    put(sender, run, range(3000))
    sender.close()
    assert sorted(run.got) == list(range(3000))
    assert run.replays


def test_a_run_that_is_not_created_yet_is_waited_for_without_a_warning(caplog):
    class Early(Run):
        def deliver(self, records, *, replay):
            if self.down:
                raise NotReadyError("soon")
            super().deliver(records, replay=replay)

    run, sender = Early(down=True), BackgroundSender(retry_seconds=0.05)
    put(sender, run, range(5))
    time.sleep(0.1)
    run.down = False
    wait_until(lambda: run.got == list(range(5)))
    sender.close()
    assert caplog.text == ""


def test_an_outage_is_reported_once(caplog):
    run, sender = Run(down=True), BackgroundSender(retry_seconds=0.01)
    for n in range(10):
        put(sender, run, [n])
        time.sleep(0.02)
    sender.close()
    assert caplog.text.count("tracking of a run is delayed: down") == 1


def test_closing_twice_is_harmless_and_leaves_no_thread():
    before = threading.active_count()
    sender = BackgroundSender()
    sender.close()
    sender.close()
    assert threading.active_count() == before
