"""SIGKILL of every process at every phase: the run ends bit-equal, or says how to."""

import json
import os
import re
import signal
import time
from dataclasses import replace
from pathlib import Path

import psutil
import pytest
import ray
import torch.distributed as dist

from tests.support import commands
from tests.support.commands import finish, shards, start, wait_for
from tests.support.demo import uninterrupted
from tp2d_lib import cli, fsdp
from tp2d_lib.checkpoint import manifest
from tp2d_lib.data import build_dataloader
from tp2d_lib.integrity import HashedFile
from tp2d_lib.mesh import build_mesh
from tp2d_lib.presets import build_config
from tp2d_lib.run import launch, loop

pytestmark = pytest.mark.faults
STEPS = 24
SETTINGS = {"max_steps": STEPS, "checkpoint_every": 2, "log_interval": 1}
LAST = f"checkpoint-{STEPS:06d}"
PHASES = ("model load", "mid-step", "before save", "mid-save", "after save")


@pytest.fixture(scope="module")
def storage(tmp_path_factory):
    return tmp_path_factory.mktemp("storage")


@pytest.fixture(scope="module")
def whole(storage, pools):
    return uninterrupted(pools, storage, **SETTINGS)


@pytest.fixture(scope="module")
def cluster():
    yield launch.connect
    ray.shutdown()


def dies_at(phase: str, victim: int):
    """A train function of which one rank is killed once, at a phase of step 4."""

    def train(config):
        marker = Path(config.storage_path, config.run_name, f"died-{config.seed}")
        back = marker.with_name("back")  # when another attempt computes again
        again = marker.exists()

        def die_once(now: str, step: int = 4):
            mine = dist.get_rank() == victim and now == phase
            if mine and step == 4 and not marker.exists():
                marker.parent.mkdir(exist_ok=True)
                marker.touch()
                os.kill(os.getpid(), signal.SIGKILL)

        mesh = build_mesh(config.dp_size, config.tp_size, config.device)
        die_once("model load")
        engine = fsdp.build_engine(config, mesh)
        loader = build_dataloader(config, mesh)
        forward, save, write = engine.model.forward, engine.save, HashedFile.write
        rename = manifest.publish

        def stepping(*args, **kwargs):
            if again and not back.exists():
                back.touch()
            die_once("mid-step", loader.step)
            return forward(*args, **kwargs)

        def saving(folder):
            die_once("before save", loader.step)
            return save(folder)

        def writing(file, data):
            done = write(file, data)
            die_once("mid-save", loader.step)
            return done

        def publishing(*args):
            folder = rename(*args)
            die_once("after save", loader.step)
            return folder

        engine.model.forward, engine.save = stepping, saving
        HashedFile.write, manifest.publish = writing, publishing
        loop.run(engine, loader, config)

    return train


@pytest.mark.parametrize("phase", PHASES)
def test_a_rank_is_killed(phase, whole, storage, cluster, survived, capsys):
    cluster()
    victim = 0 if phase == "after save" else 1  # rank 0 writes the manifest
    name = phase.replace(" ", "-")
    config = build_config("demo", str(storage), tp_size=2, run_name=name, **SETTINGS)
    launch.run(dies_at(phase, victim), config, fsdp.check)
    run = storage / name
    said = capsys.readouterr().out
    died = next(run.glob("died-*"))
    seconds = (run / "back").stat().st_mtime - died.stat().st_mtime
    with capsys.disabled():
        print(f"\nrank {victim} killed, {phase}: training again after {seconds:.1f} s")
    assert "restart 1 of 3: rank" in said
    assert not list(run.glob("*.partial"))
    good = shards(run / LAST) == whole
    assert survived("kills of a rank", good)
    history = json.loads((run / LAST / "trainer_state.json").read_text())["history"]
    assert [r["position"] for r in history] == [4 * n for n in range(1, STEPS + 1)]


def descendant(process, name: str) -> psutil.Process:
    """The process of this name that a command started."""
    return next(
        child
        for child in psutil.Process(process.pid).children(recursive=True)
        if name in " ".join([child.name(), *child.cmdline()[:1]])
    )


FLAGS = ["--max_steps", str(STEPS), "--log_interval", "1"]


@pytest.mark.parametrize("victim", ["ray::TrainController", "raylet"])
def test_a_process_of_ray_is_killed(victim, whole, storage, survived):
    """It recovers, or ends within a minute, and the command that it prints resumes."""
    name = victim.split(":")[-1]
    run = start("train_fsdp.py", storage, "--run_name", name, *FLAGS)
    assert any("] step 4/" in line for line in run.stdout), run.stderr.read()
    descendant(run, victim).kill()
    killed = time.time()
    _, err = run.communicate(timeout=commands.PATIENCE_S)
    seconds = time.time() - killed
    assert "Traceback" not in err
    if run.returncode:
        assert seconds < 60
        assert re.search(r"^failed: ", err, re.MULTILINE), err
        assert "last checkpoint: " in err
        finish(commands.resume(err))
    good = shards(storage / name / LAST) == whole
    assert survived("kills of Ray's processes", good)


def dies_while_writing(config):
    """Rank 1 dies at step 4 while a thread writes, at step 6 before it completes."""
    mesh = build_mesh(config.dp_size, config.tp_size, config.device)
    engine = fsdp.build_engine(config, mesh)
    loader = build_dataloader(config, mesh)
    save = engine.save

    def save_and_die(directory):
        future, step = save(directory), loader.step  # which moves on meanwhile
        marker = Path(config.storage_path, f"died-{step}")

        def die():
            marker.touch()
            before = manifest.partial_folder(config, step - 2).with_suffix("")
            while not before.exists():
                time.sleep(0.1)
            os.kill(os.getpid(), signal.SIGKILL)

        if mesh.get_rank() == 1 and step in (4, 6) and not marker.exists():
            if step == 4:
                die()
            future.result = die  # asked for before the checkpoint is completed
        return future

    engine.save = save_and_die
    loop.run(engine, loader, config)


def test_two_deaths_are_one_too_many(whole, storage, cluster, survived, capsys):
    """With threads that write; the command ends with 1 and says how to resume."""
    cluster()
    settings = SETTINGS | {"run_name": "torn", "max_failures": 1}
    config = build_config("demo", str(storage), tp_size=2, **settings)
    config = launch.prepare(fsdp.check(replace(config, async_checkpoint=True)))
    argv = ["--tp_size", "2", "--run_name", "torn"]
    assert cli.train(dies_while_writing, config, argv) == 1
    out, err = capsys.readouterr()
    assert cli.train(dies_while_writing, config, argv) == 0
    assert {path.name for path in storage.glob("died-*")} == {"died-4", "died-6"}
    assert re.findall(r"resumed after step (\d+)", out) == ["2"]
    assert re.search(r"^failed: rank \d", err, re.MULTILINE)
    assert f"last checkpoint: {storage}/torn/checkpoint-000004\n" in err
    assert err.strip().endswith("--tp_size 2 --resume_from torn")
    assert "resumed after step 4" in capsys.readouterr().out
    assert survived("kills of a rank", shards(storage / "torn" / LAST) == whole)


@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT"])
def test_a_signal_early_and_a_second_one(name, storage, survived):
    """Before Ray has started, while workers start; then while training, twice."""
    number = signal.Signals[name]
    run = start("train_fsdp.py", storage, "--run_name", f"soon-{name}", *FLAGS)
    time.sleep(6)
    run.send_signal(number)
    _, err = finish(run, code=1)
    assert survived("signals", "stopped: " in err)

    run = start("train_fsdp.py", storage, "--run_name", f"starting-{name}", *FLAGS)
    assert any("Ray cluster" in line for line in run.stdout), run.stderr.read()
    time.sleep(2)  # until workers are asked for, or nearly
    run.send_signal(number)
    _, err = finish(run, code=1)
    early = re.search("^stopped: .*before .*train", err)
    assert survived("signals", bool(early))

    run = start("train_fsdp.py", storage, "--run_name", f"twice-{name}", *FLAGS)
    assert any("] step 4/" in line for line in run.stdout), run.stderr.read()
    run.send_signal(number)
    time.sleep(0.02)
    run.send_signal(number)
    _, err = finish(run, code=1)
    assert (
        "stopped: at once, by a second signal; nothing was saved\nlast checkpoint:"
        in err
    )
    assert survived("signals", "to resume: python" in err)


def test_the_driver_is_killed(whole, storage, survived):
    run = start("train_fsdp.py", storage, "--run_name", "driver", *FLAGS)
    assert any("] step 4/" in line for line in run.stdout), run.stderr.read()
    os.kill(run.pid, signal.SIGKILL)
    run.communicate()
    again = start("train_fsdp.py", storage, "--resume_from", "driver", *FLAGS)
    out, _ = finish(again)
    assert "resumed after step" in out
    good = shards(storage / "driver" / LAST) == whole
    assert survived("kills of the driver", good)


def test_the_driver_is_killed_while_it_prepares_data(
    whole, storage, survived, tmp_path
):
    run = start("train_fsdp.py", tmp_path, "--run_name", "early", *FLAGS)
    wait_for(lambda: list(tmp_path.glob("data/*")), run)
    os.kill(run.pid, signal.SIGKILL)
    run.communicate()
    finish(start("train_fsdp.py", tmp_path, "--run_name", "early", *FLAGS))
    good = shards(tmp_path / "early" / LAST) == whole
    assert survived("kills of the driver", good)
