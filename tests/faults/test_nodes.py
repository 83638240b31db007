"""A cluster of several nodes that loses one: killed, or announced beforehand."""

import os
import re
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import ray
import torch.distributed as dist
from ray.cluster_utils import Cluster

from tests.support.commands import shards, wait_until
from tests.support.demo import train_with, train_without_ray, uninterrupted
from tp2d_lib import autotp, checkpoint, fsdp
from tp2d_lib.config import ConfigError
from tp2d_lib.presets import build_config
from tp2d_lib.run import cluster, launch, placement

pytestmark = pytest.mark.faults
STEPS = 40
SETTINGS = {"max_steps": STEPS, "checkpoint_every": 10, "log_interval": 1}
LAST = f"checkpoint-{STEPS:06d}"


@pytest.fixture
def nodes(monkeypatch):
    """A head without CPUs, where the driver is, and two nodes for workers."""
    started = Cluster(
        initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False}
    )
    started.add_node(num_cpus=2)
    started.add_node(num_cpus=2)
    started.wait_for_nodes()
    monkeypatch.setenv("RAY_ADDRESS", started.address)
    yield started
    ray.shutdown()
    started.shutdown()


@pytest.fixture(scope="module")
def storage(tmp_path_factory):
    return tmp_path_factory.mktemp("storage")


@pytest.fixture(scope="module")
def whole(storage, pools):
    return uninterrupted(pools, storage, **SETTINGS)


def tells_its_node(config):
    """Training whose first attempt writes its node at step 14, and walks from then."""
    marker = Path(config.storage_path, f"{config.run_name}.node")

    def change(compute, loader):
        first = not marker.exists()
        dist.barrier()  # all have looked for the marker

        def step(batch):
            if first and loader.step >= 14:
                if dist.get_rank() == 0 and not marker.exists():
                    marker.write_text(ray.get_runtime_context().get_node_id())
                time.sleep(0.5)
            return compute(batch)

        return step

    train_with(config, change)


def run_and_lose(how, nodes, storage, name, capsys) -> str:
    """What is printed by a run whose node is lost, ``how(node_id)``, at step 14."""
    config = build_config("demo", str(storage), tp_size=2, run_name=name, **SETTINGS)
    marker = storage / f"{name}.node"

    def lose():
        wait_until(lambda: marker.exists() and marker.read_text())
        how(marker.read_text())

    loser = threading.Thread(target=lose, daemon=True)
    loser.start()
    launch.run(tells_its_node, replace(config, device="cpu"), fsdp.check)
    loser.join()
    return capsys.readouterr().out


def test_a_node_is_killed(whole, nodes, storage, survived, capsys):
    """Its ranks, with all else on it, are gone; the other node takes over."""

    def kill(node_id):
        lost = next(node for node in nodes.worker_nodes if node.node_id == node_id)
        nodes.remove_node(lost, allow_graceful=False)

    out = run_and_lose(kill, nodes, storage, "killed", capsys)
    assert "resumed after step 10" in out
    assert re.search("restart 1 of 3: rank ", out)
    assert survived("kills of a node", shards(storage / "killed" / LAST) == whole)


def test_a_node_is_about_to_be_taken_away(whole, nodes, storage, survived, capsys):
    """It is told in advance: saved after the step at hand, then another node."""

    def announce(node_id):
        command = [Path(sys.executable).with_name("ray"), "drain-node"]
        command += ["--address", nodes.address, "--node-id", node_id]
        command += ["--reason", "DRAIN_NODE_REASON_PREEMPTION"]
        command += ["--reason-message", "spot", "--deadline-remaining-seconds", "60"]
        subprocess.run(command, check=True, capture_output=True, env=os.environ)

    out = run_and_lose(announce, nodes, storage, "announced", capsys)
    assert "preemption: ranks 0, 1 will lose their node; saving\n" in out
    assert "restart: preemption\n" in out
    saved = int(re.search(r"resumed after step (\d+)", out)[1])
    assert saved % 10 != 0
    good = shards(storage / "announced" / LAST) == whole
    assert survived("preemptions of a node", good)


def test_gpus_of_a_lost_node_are_waited_for_aloud(nodes, storage):
    """Declared GPUs: this is the driver's part only."""
    first = nodes.add_node(num_cpus=2, num_gpus=2)
    nodes.wait_for_nodes()
    config, said = build_config("demo", str(storage), tp_size=2, device="cuda"), []
    launch.connect()
    placement.find(config, said.append, seconds=2)
    assert not said
    nodes.remove_node(first, allow_graceful=False)
    wait_until(lambda: cluster.gpus() == 0)
    with pytest.raises(ConfigError, match=r"num_workers=2 needs 1 x 2 GPUs"):
        placement.find(config, said.append, seconds=2)
    assert said == ["waiting for 1 x 2 GPUs, each on one node"]
    with ThreadPoolExecutor() as pool:
        waiting = pool.submit(placement.find, config, said.append, seconds=60)
        wait_until(lambda: len(said) == 2)
        nodes.add_node(num_cpus=2, num_gpus=2)
        assert len(waiting.result(timeout=60)) == 2


def walks(engine, config):
    """Training that takes its time, and tells the node and width of each attempt."""
    marker = Path(config.storage_path, config.run_name, f"width-{config.dp_size}")

    def change(compute, loader):
        def step(batch):
            if loader.step >= 14:
                if dist.get_rank() == 0:
                    marker.write_text(ray.get_runtime_context().get_node_id())
                time.sleep(0.5)
            return compute(batch)

        return step

    train_with(config, change, engine)


@pytest.mark.parametrize("engine", [fsdp, autotp], ids=["fsdp", "autotp"])
def test_fewer_dp_ranks_go_on_until_there_is_room_again(
    engine, nodes, storage, pools, capsys, survived
):
    """A node of two is killed; another one is busy at first, and then free."""
    settings = {**SETTINGS, "checkpoint_every": 5, "batch_size_per_gpu": 2}
    alone = build_config(
        "demo", str(storage), tp_size=2, gradient_accumulation_steps=2, **settings
    )
    name = engine.__name__.rpartition(".")[2]
    alone = launch.prepare(engine.check(replace(alone, device="cpu")))
    rank = pools(2, name).run(train_without_ray, name, alone, str(storage / name))[0]
    nodes.add_node(num_cpus=2)
    nodes.wait_for_nodes()
    launch.connect()
    busy = ray.util.placement_group([{"CPU": 2}])
    assert busy.wait(30)

    run = storage / f"elastic-{name}"

    def kill_then_free():
        wait_until((run / "width-2").exists)
        wait_until((run / "width-2").read_text)
        node_id = (run / "width-2").read_text()
        lost = next(node for node in nodes.worker_nodes if node.node_id == node_id)
        nodes.remove_node(lost, allow_graceful=False)
        wait_until((run / "width-1").exists)
        ray.util.remove_placement_group(busy)

    loser = threading.Thread(target=kill_then_free, daemon=True)
    loser.start()
    config = build_config(
        "demo", str(storage), tp_size=2, dp_size=2, min_dp_size=1, **settings
    )
    config = replace(config, device="cpu", run_name=f"elastic-{name}")
    result = launch.run(partial(walks, engine), config, engine.check)
    loser.join()
    out = capsys.readouterr().out
    assert re.search(
        r"restart 1 of 3: rank .*\ndp_size 2 -> 1 until there is room\n"
        r".*resumed after step \d+\n.*"
        r"restart: there is room for more dp ranks\n.*resumed after step \d+\n",
        out,
        re.DOTALL,
    )
    losses = [record["loss"] for record in checkpoint.history(result)]
    assert losses == pytest.approx([loss for loss, _ in rank], rel=1e-5)
    assert survived("losses of a node with min_dp_size", len(losses) == STEPS)
