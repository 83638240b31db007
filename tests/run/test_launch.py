"""Runs through Ray Train: resources checked, runs continued, errors passed on."""

import errno
import json
import logging
import os
import re
import warnings
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass, replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import pytest
import ray
import torch.distributed as dist
from ray.train.v2._internal.state.util import is_actor_alive
from ray.util.state.exception import RayStateApiException

from tests.support.commands import wait_until
from tests.support.demo import train_with
from tp2d_lib import autotp, checkpoint, cli, fsdp
from tp2d_lib.checkpoint import storage
from tp2d_lib.config import ConfigError
from tp2d_lib.data import build_dataloader
from tp2d_lib.mesh import build_mesh
from tp2d_lib.model import determinism
from tp2d_lib.presets import build_config
from tp2d_lib.run import launch, loop, watchdog
from tp2d_lib.run.attempts import Failed


@pytest.fixture(scope="module")
def cluster():
    """A cluster of our own for the tests that follow each other."""
    yield launch.connect
    ray.shutdown()


@pytest.mark.ranks
def test_too_few_gpus_is_said_before_a_worker_starts(tmp_path):
    ray.init(address="local", num_gpus=5, logging_level="ERROR", log_to_driver=False)
    try:
        config = build_config("demo", str(tmp_path), tp_size=2, dp_size=3)
        with pytest.raises(
            ConfigError, match=r"num_workers=6 must not exceed the cluster.s 5 GPUs"
        ):
            launch.run(fsdp.train_func, config, fsdp.check)
        assert launch.pick_device(replace(config, device="cpu")) == "cpu"
        fits = replace(config, dp_size=1, num_workers=2)
        assert launch.pick_device(fits) == "cuda"
    finally:
        ray.shutdown()


class Dashboard(BaseHTTPRequestHandler):
    """One of another cluster, which knows no actor of ours."""

    def do_GET(self):
        actors = {"result": [], "total": 0, "num_after_truncation": 0}
        answer = {"result": True, "msg": "", "data": {"result": actors}}
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.end_headers()
        self.wfile.write(json.dumps(answer).encode())

    def log_message(self, *args):
        """Nothing."""


@contextmanager
def anothers_dashboard():
    """At the port that every cluster names, also one without a dashboard."""
    try:
        server = ThreadingHTTPServer(("127.0.0.1", 8265), Dashboard)
    except OSError:  # one is there
        yield
        return
    with server:
        Thread(target=server.serve_forever, daemon=True).start()
        yield
        server.shutdown()


def test_anothers_dashboard_does_not_end_a_live_run(cluster):
    """Ray Train's cleaner ends the workers of a controller that "is not alive"."""
    cluster()
    alive = ray.remote(num_cpus=0)(is_actor_alive)
    with (
        anothers_dashboard(),
        pytest.raises(RayStateApiException, match="Failed to connect to API server"),
    ):
        ray.get(alive.remote("f" * 32, 5))


def watched(config):
    """The usual training; its ranks note what they found when they started."""
    found = {name: os.environ.get(name) for name in determinism.DEFAULTS}
    Path(config.storage_path, "environment.json").write_text(json.dumps(found))
    fsdp.train_func(config)


def test_same_name_goes_on_where_it_stopped(cluster, tmp_path, capsys):
    """Also on another mesh, whatever Ray's own list says; once done, at once."""
    cluster()
    settings = {"run_name": "again", "log_interval": 3, "checkpoint_every": 2}
    settings["deterministic"] = True
    config = build_config("demo", str(tmp_path), max_steps=4, tp_size=2, **settings)
    first = checkpoint.history(launch.run(watched, config, fsdp.check))
    found = json.loads((tmp_path / "environment.json").read_text())
    assert found == determinism.environment()
    assert [record["step"] for record in first] == [2, 3, 4]
    assert "step 4/4" in capsys.readouterr().out

    (tmp_path / "again" / "checkpoint_manager_snapshot.json").write_text('{"torn')
    moved = build_config("demo", str(tmp_path), max_steps=6, dp_size=2, **settings)
    moved = replace(moved, batch_size_per_gpu=2)
    result = launch.run(fsdp.train_func, moved, fsdp.check)
    second = checkpoint.history(result)
    out = capsys.readouterr().out
    assert "changed since step 4: tp_size 2 -> 1, dp_size 1 -> 2, batch_size_p" in out
    assert "resumed after step 4" in out
    assert second[: len(first)] == first
    assert [record["step"] for record in second[len(first) :]] == [6]
    assert second[-1]["position"] == 6 * moved.global_batch_size
    kept = sorted(path.name for path in Path(result.path).glob("checkpoint-*"))
    assert kept == ["checkpoint-000004", "checkpoint-000006"]  # save_total_limit

    assert launch.run(fsdp.train_func, moved, fsdp.check).path == result.path
    assert "nothing left to train after step 6 of" in capsys.readouterr().out

    with pytest.raises(ConfigError, match=r"run_name='again' must resume with the eng"):
        launch.run(autotp.train_func, moved, autotp.check)
    with pytest.raises(ConfigError, match=r"seed=7 must be what .*-000006 was written"):
        launch.run(fsdp.train_func, replace(moved, seed=7), fsdp.check)


def hindered(config):
    """Training with slow writes and files that stay; it first cannot export.

    It notes in which phases its own code runs.
    """
    first = not Path(config.storage_path, "export failed").exists()
    dist.barrier()  # all have looked

    def note(what):
        Path(config.storage_path, what.format(watchdog.heart.phase)).touch()

    def save_slowly(directory):
        future, last = save(directory), loader.step == config.max_steps
        result = future.result

        def when_the_next_waits():
            future.result = result
            if not last:
                wait_until(lambda: watchdog.heart.phase == "earlier save", seconds=300)
            return result()

        future.result = when_the_next_waits
        return future

    def fail(directory):
        note("export failed")
        raise RuntimeError("the exporter tripped")

    def refuse(path, **options):
        if path == "trainer_state.json":
            raise PermissionError(errno.EPERM, "Operation not permitted", path)
        unlink(path, **options)

    def write(config, name, content):
        note(f"{name.partition('/')[0]} in {{}}")
        write_file(config, name, content)

    mesh = build_mesh(config.dp_size, config.tp_size, config.device)
    engine = fsdp.build_engine(config, mesh)
    loader = build_dataloader(config, mesh)
    save, unlink, write_file = engine.save, os.unlink, storage.write
    engine.save, storage.write = save_slowly, write
    if first:
        engine.export, os.unlink = fail, refuse
    loop.run(engine, loader, config, on_step_end=lambda *_: note("own in {}"))


@pytest.mark.faults
def test_long_work_is_announced_and_a_finished_run_exports_again(
    cluster, tmp_path, capsys
):
    """What stays undeleted is told once; nothing of it is a hang, or fails the run."""
    cluster()
    settings = {"max_steps": 3, "checkpoint_every": 1, "save_total_limit": 1}
    settings |= {"async_checkpoint": True}
    settings |= {"export_to": str(tmp_path / "export"), "run_name": "again"}
    config = build_config("demo", str(tmp_path), tp_size=2, device="cpu", **settings)
    config = launch.prepare(fsdp.check(replace(config, dtype="float32")))
    assert cli.train(hindered, config, []) == 0
    last, out = tmp_path / "again" / "checkpoint-000003", capsys.readouterr().out
    assert re.search("restart 1 of 3: rank .*: RuntimeError: the exporter tripped", out)
    assert f"nothing left to train after step 3 of {last}\n" in out
    exported = f"exported to {tmp_path}/export in float32\n"
    assert re.search(f"{exported}done: step 3, loss .*, {last}\n", out)
    assert list(tmp_path.glob("export/model*.safetensors"))
    kept = re.findall(r"(\d+)\.old-\w+\.partial cannot be deleted yet \(.*tr", out)
    assert kept == ["000001", "000002"]
    assert list(last.parent.glob("checkpoint-*")) == [last]
    noted = {path.name for path in tmp_path.glob("* in *")}
    assert noted == {"own in on_step_end"}


def fails(config):
    print("rank", dist.get_rank(), "speaks")
    warnings.warn("not to be shown", stacklevel=1)
    logging.getLogger().warning("nor this")
    raise RuntimeError("the third layer melted")


def test_a_workers_error_and_prints_reach_the_driver(cluster, tmp_path, capfd):
    cluster()
    config = build_config("demo", str(tmp_path), max_failures=0, tp_size=2)
    with pytest.raises(Failed, match="RuntimeError: the third layer melted\nno check"):
        launch.run(fails, config, fsdp.check)
    said, others = capfd.readouterr()
    rows, started, spoken = said.splitlines()[-3:]
    assert re.fullmatch("started 2 workers in [0-9]+ s", started)
    assert " documents, " in rows
    assert spoken == "rank 0 speaks"
    assert "nor this" not in others


def kills_the_progress_actor(config):
    """Training in which that process dies at the third step."""

    def change(compute, loader):
        def step(batch):
            if loader.step == 3 and dist.get_rank() == 0:
                actor = ray.get_actor(watchdog.actor_name(config.run_name))
                ray.kill(actor, no_restart=False)
            return compute(batch)

        return step

    train_with(config, change)


@pytest.mark.faults
def test_a_lost_progress_actor_fails_no_run(cluster, tmp_path, capsys):
    cluster()
    settings = {"max_steps": 6, "log_interval": 1, "max_failures": 0}
    config = build_config("demo", str(tmp_path), tp_size=2, **settings)
    result = launch.run(kills_the_progress_actor, config, fsdp.check)
    assert len(checkpoint.history(result)) == 6
    assert "step 6/" in capsys.readouterr().out


def test_ray_restarts_nothing_also_before_it_knew_preemptions(monkeypatch):
    assert getattr(launch.never_retry(), "max_preemption_failures", 0) == 0

    @dataclass
    class OfRay257:
        max_failures: int = 0
        controller_failure_limit: int = -1

    monkeypatch.setattr(ray.train, "FailureConfig", OfRay257)
    assert launch.never_retry() == OfRay257(0, 0)


def test_the_environment_can_be_merged_with_that_of_a_ray_job(monkeypatch):
    options = {}
    for name, value in launch.environment.WORKER_ENV.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(ray, "init", lambda **given: options.update(given))
    launch.cluster.init("lock.txt", "local")
    assert options["runtime_env"]["pip"] == "lock.txt"
    assert deepcopy(options["runtime_env"]) == options["runtime_env"]  # as Ray does
