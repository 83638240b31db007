"""Ranks that stop answering, in real runs: noticed, named, replaced."""

import os
import re
import signal
import threading
import time
from pathlib import Path

import pytest
import ray
import torch.distributed as dist

from tests.support.demo import train_with
from tp2d_lib import checkpoint, fsdp
from tp2d_lib.presets import build_config
from tp2d_lib.run import launch, watchdog

RESTART = r"restart 1 of 3: hang: (.*)"

pytestmark = pytest.mark.faults


@pytest.fixture(scope="module")
def cluster():
    """A cluster of our own; what a failed test left stopped is woken, to be ended."""
    pids = []
    yield pids
    for pid in pids:
        if os.path.exists(f"/proc/{pid}"):
            os.kill(pid, signal.SIGKILL)
    ray.shutdown()


def train(storage, name, fault):
    """The losses of a run of eight steps; ``fault(rank)`` happens once, at step 5."""

    def train_func(config):
        marker = Path(config.storage_path, f"{name}.fault")

        def change(compute, loader):
            def step(batch):
                if loader.step == 5 and dist.get_rank() == 1 and not marker.exists():
                    marker.write_text(f"{os.getpid()} {time.time()}")
                    fault()
                return compute(batch)

            return step

        train_with(config, change)

    config = build_config(
        "demo",
        str(storage),
        tp_size=2,
        device="cpu",
        max_steps=8,
        checkpoint_every=2,
        log_interval=1,
        run_name=name,
        hang_timeout=5,
    )
    result = launch.run(train_func, config, fsdp.check)
    return [(record["step"], record["loss"]) for record in checkpoint.history(result)]


@pytest.fixture(scope="module")
def undisturbed(cluster, tmp_path_factory):
    return train(tmp_path_factory.mktemp("storage"), "whole", lambda: None)


def recovered(storage, name, fault, cluster, capsys) -> tuple[list, str]:
    """Losses, and what was said of the hang; how long it took goes to the log."""
    marker = storage / f"{name}.fault"

    def look():  # notes the victim, so that it is never left behind
        while not marker.exists() or not marker.read_text():
            time.sleep(0.1)
        cluster.append(int(marker.read_text().split()[0]))

    threading.Thread(target=look, daemon=True).start()
    losses = train(storage, name, fault)
    began = float(marker.read_text().split()[1])
    found = re.search(RESTART, out := capsys.readouterr().out)
    assert found, out
    assert "resumed after step 4" in out
    traces = storage / name / watchdog.TRACES
    seen = [path.stat().st_mtime - began for path in traces.iterdir()]
    with capsys.disabled():
        print(
            f"\n{name}: {found[1]}\nnoticed {min(seen):.1f} s, "
            f"done {time.time() - began:.1f} s after"
        )
    return losses, found[1]


def stop():
    os.kill(os.getpid(), signal.SIGSTOP)


def test_a_rank_that_is_stopped_is_replaced(cluster, undisturbed, tmp_path, capsys):
    losses, said = recovered(tmp_path, "stopped", stop, cluster, capsys)
    assert losses == undisturbed
    assert re.fullmatch(
        r"rank 1 on host \S+ has said nothing since step 5 \(\d+ s\)", said
    )
    assert not os.path.exists(f"/proc/{cluster[-1]}")
    traces = tmp_path / "stopped" / watchdog.TRACES
    assert [path.name for path in traces.iterdir()] == ["rank_0"]


def sleep_forever():
    while True:
        time.sleep(0.1)


def test_a_rank_that_never_comes_is_replaced(cluster, undisturbed, tmp_path, capsys):
    losses, said = recovered(tmp_path, "asleep", sleep_forever, cluster, capsys)
    assert losses == undisturbed
    assert re.match(r"no rank has finished a step for [5-9] s: rank ", said)
    assert re.search(
        r"rank 1 on host \S+ at step 5 in sleep_forever \(test_hangs", said
    )
