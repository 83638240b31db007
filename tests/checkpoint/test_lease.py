"""One writer of a run's folder, among real processes that live, die and are stopped."""

import json
import multiprocessing
import os
import select
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tp2d_lib.checkpoint import lease
from tp2d_lib.config import ConfigError, TrainConfig

pytestmark = pytest.mark.ranks  # not those, but processes that take their time
SECONDS = 5.0  # instead of 20
TRIES = 5
HOLDER = """
import sys
from tp2d_lib.checkpoint import lease
from tp2d_lib.config import TrainConfig

config = TrainConfig(storage_path=sys.argv[1], run_name="mine")
with lease.hold(config, seconds=float(sys.argv[2])) as held:
    held.on_loss(lambda error: print(error, flush=True))
    print("held", flush=True)
    sys.stdin.read()
"""


@pytest.fixture
def config(tmp_path):
    return TrainConfig(storage_path=str(tmp_path), run_name="mine")


@pytest.fixture
def other(tmp_path):
    """Another process that holds the lease."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(tmp_path), str(SECONDS)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.communicate()


def acquire(config) -> float:
    """Hold the lease for a moment; how long it took to get."""
    began = time.monotonic()
    with lease.hold(config, seconds=SECONDS):
        return time.monotonic() - began - lease.SETTLE_S


def test_refused_while_the_first_lives(config, other):
    expected = (
        f"run_name='mine' is being trained by process {other.pid} on "
        rf"{socket.gethostname()} \(since .*; try run_name='mine-2', or end"
    )
    for _ in range(2):
        with pytest.raises(ConfigError, match=expected):
            acquire(config)
    other.communicate()  # it ends and releases
    assert lease.read(config) is None
    assert acquire(config) < 1


@pytest.mark.parametrize("cause", [ValueError, KeyboardInterrupt])
def test_released_whatever_ends_it(config, cause):
    def fail():
        with lease.hold(config):
            assert lease.read(config)["pid"] == os.getpid()
            raise cause

    with pytest.raises(cause):
        fail()
    assert lease.read(config) is None
    assert not any(path.suffix == ".tmp" for path in lease_folder(config))


def lease_folder(config):
    return list(Path(config.storage_path, config.run_name).iterdir())


def test_a_dead_process_of_this_machine_is_taken_over_at_once(config, other):
    other.kill()  # and not waited for: a zombie is dead, too
    assert acquire(config) < 1


def test_another_process_with_the_same_pid_does_not_hold_it(config):
    with lease.hold(config) as held:
        stored = held.content
    lease.storage.write(
        config, lease.LEASE, json.dumps(stored | {"started": "1"}).encode()
    )
    assert acquire(config) < 1


def test_a_holder_elsewhere_is_dead_when_it_falls_silent(config):
    with lease.hold(config) as held:
        stored = held.content | {"host": "far", "machine": "far", "pid": 1}
    lease.storage.write(config, lease.LEASE, json.dumps(stored).encode())
    assert SECONDS < acquire(config) < SECONDS + 2


def test_a_suspended_holder_loses_and_notices(config, other, monkeypatch):
    monkeypatch.setattr(lease, "holder", lease.read(config)["holder"])
    lease.check(config)  # its workers may write
    other.send_signal(signal.SIGSTOP)
    with lease.hold(config, seconds=SECONDS) as held:
        with pytest.raises(lease.LeaseLost, match="taken over by another process"):
            lease.check(config)  # they no longer may, though it sleeps
        other.send_signal(signal.SIGCONT)
        assert select.select([other.stdout], [], [], 20)[0]
        assert "run_name='mine' was taken over" in other.stdout.readline()
        other.communicate()  # it ends, and leaves the lease alone
        assert held.is_mine()
        time.sleep(SECONDS / 2)
        assert held.lost is None


def contend(storage, barrier, answers):
    """Twenty times at the same moment as the other process."""
    lease.SETTLE_S = 0.5
    for number in range(TRIES):
        config = TrainConfig(storage_path=storage, run_name=f"run{number}")
        barrier.wait()
        try:
            with lease.hold(config, seconds=SECONDS) as held:
                barrier.wait()
                answers.put((number, held.is_mine()))
        except ConfigError:
            barrier.wait()


def test_of_two_that_start_at_once_one_wins(tmp_path):
    spawn = multiprocessing.get_context("spawn")
    barrier, answers = spawn.Barrier(2), spawn.Queue()
    both = [
        spawn.Process(target=contend, args=(str(tmp_path), barrier, answers))
        for _ in range(2)
    ]
    for process in both:
        process.start()
    for process in both:
        process.join(timeout=200)
    won = sorted(answers.get(timeout=1) for _ in range(TRIES))
    assert won == [(number, True) for number in range(TRIES)]
    assert answers.empty()
