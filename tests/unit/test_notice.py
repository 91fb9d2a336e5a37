"""SIGTERM to the driver becomes a file that the workers look for."""

from __future__ import annotations

import os
import signal

import pytest

from pipeline.training.trainer import stop_on_sigterm


def test_the_first_sigterm_asks_the_workers_and_the_second_ends_the_driver(tmp_path):
    file = tmp_path / "stop.request"
    file.write_text("of the run before")
    before = signal.getsignal(signal.SIGTERM)
    with stop_on_sigterm(file) as asked:
        assert not asked()
        assert not file.exists(), "an old request must not stop a new run"
        os.kill(os.getpid(), signal.SIGTERM)
        assert asked()
        assert file.exists()
        with pytest.raises(SystemExit) as ended:
            os.kill(os.getpid(), signal.SIGTERM)
    assert ended.value.code == 143
    assert signal.getsignal(signal.SIGTERM) is before
    assert not file.exists()
