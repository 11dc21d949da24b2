"""What asks a run to stop, each by itself and told by name."""

import os
import signal

import pytest

from pipeline.runtime.stopping import Stop


@pytest.fixture
def handlers():
    before = {number: signal.getsignal(number) for number in (signal.SIGUSR1, signal.SIGTERM)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("number", [signal.SIGUSR1, signal.SIGTERM])
def test_a_signal_stops_the_run_and_not_the_process(handlers, tmp_path, number):
    stop = Stop().install()
    stop.watch(tmp_path / "stop", None)
    assert not stop.requested()
    os.kill(os.getpid(), number)
    assert stop.requested()
    assert stop.reason == number.name


def test_a_file_stops_the_run(tmp_path):
    stop = Stop()
    stop.watch(tmp_path / "stop", None)
    assert not stop.requested()
    (tmp_path / "stop").touch()
    assert stop.requested()
    assert stop.reason == "stop file"


def test_a_time_limit_stops_the_run(tmp_path):
    stop = Stop()
    stop.watch(tmp_path / "stop", 1000)
    assert not stop.requested()
    stop.watch(tmp_path / "stop", 0)
    assert stop.requested()
    assert stop.reason == "time limit"
