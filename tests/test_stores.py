"""A run in an object store: trained, killed, resumed on another mesh, exported."""

import os
import re
import signal
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from transformers import AutoModelForCausalLM

from tests.support import commands, gs, s3
from tests.support.demo import make_config, train_without_ray
from tp2d_lib import autotp, checkpoint, cli, data, fsdp, store
from tp2d_lib.checkpoint import CheckpointError, manifest, saving, storage
from tp2d_lib.config import ConfigError, TrainConfig
from tp2d_lib.mesh import build_mesh
from tp2d_lib.run import launch

RUNS = f"s3://{s3.BUCKET}/runs"


@pytest.fixture(scope="module")
def server():
    with s3.running() as started, pytest.MonkeyPatch.context() as patch:
        for name, value in started.environment.items():
            patch.setenv(name, value)
        yield started
        store.connect.cache_clear()


@pytest.fixture(scope="module")
def google():
    with gs.running() as variables, pytest.MonkeyPatch.context() as patch:
        for name, value in variables.items():
            patch.setenv(name, value)
        yield variables
        store.connect.cache_clear()


@pytest.fixture(params=["s3", "gs"])
def runs(request):
    """A folder for runs in a store, and what a client of it has in its environment."""
    if request.param == "s3":
        return RUNS, request.getfixturevalue("server").environment
    return RUNS.replace("s3:", "gs:"), request.getfixturevalue("google")


@pytest.fixture(scope="module")
def disk(tmp_path_factory):
    """A folder that every node sees: rows, and what must be on a disk for a while."""
    return tmp_path_factory.mktemp("disk")


def start(engine, config, disk, runs, *flags):
    """A command that trains what a configuration says, in a store."""
    script = {"fsdp": "train_fsdp.py", "autotp": "train_deepspeed.py"}[engine]
    values = ["model_name", "dataset_name", "dataset_percentage", "seq_length"]
    values += ["max_steps", "learning_rate", "log_interval", "device"]
    command = [sys.executable, commands.ROOT / script, "--cache_dir", disk]
    command += ["--run_name", f"{engine}-run", "--storage_path", runs]
    command += [x for name in values for x in (f"--{name}", getattr(config, name))]
    return commands.run([str(part) for part in (*command, *flags)])


def weights(folder) -> dict[str, torch.Tensor]:
    return AutoModelForCausalLM.from_pretrained(folder).state_dict()


@pytest.mark.faults
@pytest.mark.parametrize(
    ("engine", "runs"),
    [("fsdp", "s3"), ("autotp", "s3"), ("fsdp", "gs")],
    indirect=["runs"],
)
def test_killed_then_resumed_on_another_mesh_and_exported(
    engine, runs, demo_paths, disk, tmp_path, pools
):
    where, _ = runs
    settings = {"dataset_percentage": 20, "max_steps": 16, "log_interval": 1}
    config = make_config(demo_paths, tmp_path, 2, 1, device="cpu", **settings)
    whole = (engine, config, str(tmp_path / "whole"), "export")
    pools(2, engine).run(train_without_ray, *whole)
    before = ("--tp_size", "2", "--batch_size", "4", "--checkpoint_every", "2")
    killed = start(engine, config, disk, where, *before)
    run = store.path(where) / f"{engine}-run"
    done = run / "checkpoint-000002" / manifest.MANIFEST
    commands.wait_for(done.is_file, killed)
    os.killpg(killed.pid, signal.SIGKILL)
    killed.communicate()

    out = f"{where}/{engine}-model"
    after = ("--tp_size", "1", "--dp_size", "2", "--batch_size", "2")
    after += ("--checkpoint_every", "4", "--export_to", out)
    printed, _ = commands.finish(start(engine, config, disk, where, *after))
    step = int(re.search(r"resumed after step (\d+)", printed)[1])
    assert "done: step 16, loss" in printed

    kept = [name for name in store.names(run) if name.startswith("checkpoint-")]
    assert sorted(kept) == [f"checkpoint-{max(step, 12):06d}", "checkpoint-000016"]
    assert any("events.out" in name for name in store.names(run / "tensorboard"))
    assert not list(disk.rglob("*.pt"))  # what was fetched for a while is deleted
    exported = store.fetch(store.path(out), tmp_path / "exported")
    assert "# " + Path(out).name in (exported / "README.md").read_text()
    found, expected = weights(exported), weights(tmp_path / "whole")
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-3, atol=1e-4)


@pytest.mark.faults
@pytest.mark.parametrize(
    ("answer", "seconds", "code"),
    [
        ("503 Slow Down", 60, 0),
        ("403 Forbidden", 600, 1),
        ("507 Insufficient Storage", 600, 1),  # as full MinIO servers answer
    ],
)
def test_a_store_that_fails_while_a_run_trains(
    answer, seconds, code, server, demo_paths, disk, tmp_path
):
    """Away for a minute, it is waited for; for good, the run ends, and can resume."""
    settings = {"dataset_percentage": 20, "max_steps": 30, "log_interval": 1}
    config = make_config(demo_paths, tmp_path, 2, 1, device="cpu", **settings)
    name = f"away-{answer[:3]}"
    flags = ("--run_name", name, "--tp_size", "1", "--checkpoint_every", "2")
    flags += ("--batch_size", "4")
    command = start("fsdp", config, disk, RUNS, *flags)
    run = store.path(RUNS) / name
    first = run / "checkpoint-000004" / manifest.MANIFEST
    commands.wait_for(first.is_file, command)
    with server.failing(answer, seconds):
        printed, err = commands.finish(command, code)
    assert server.refused > 0
    if code:
        assert f"failed: storage_path='{RUNS}' must stay readable and writable" in err
        assert "last checkpoint: unknown while storage_path cannot be read" in err
        assert f"--resume_from {name}" in err
        assert any(n.startswith("checkpoint-") for n in store.names(run))
        printed, _ = commands.finish(start("fsdp", config, disk, RUNS, *flags))
        assert "resumed after step" in printed
    assert re.search(rf"done: step 30, loss .*, {run}/checkpoint-000030", printed)


def save_twice(config):
    """Two checkpoints of AutoTP in the store, without Ray."""
    mesh = build_mesh(config.dp_size, config.tp_size, config.device)
    engine = autotp.build_engine(config, mesh)
    for step in (1, 2):
        state = {"step": step, "position": step, "history": []}
        saving.save(engine, state, config)()
    dist.barrier()


def restore(config):
    mesh = build_mesh(config.dp_size, config.tp_size, config.device)
    said = []
    state = saving.restore(autotp.build_engine(config, mesh), config, said.append)
    return state["step"], said


def test_a_damaged_shard_is_found_by_the_driver_that_fetches_it(
    server, demo_paths, tmp_path, pools
):
    """Its size is right, so that only a digest tells; then the one before is loaded."""
    ranks = pools(2, "damaged")
    ranks.run(set_environment, server.environment)
    config = make_config(demo_paths, tmp_path, 2, 1, run_name="damaged", device="cpu")
    config = replace(config, storage_path=RUNS, cache_dir=str(tmp_path))
    config = replace(config, prepared_data=str(data.prepare(config)))
    ranks.run(save_twice, config)
    newest = manifest.checkpoints(config)[0]
    shard = next(name for name in store.files(newest) if name.endswith("states.pt"))
    content = bytearray((newest / shard).read_bytes())
    content[len(content) // 2] ^= 1
    (newest / shard).write_bytes(bytes(content))
    autotp.prepare_start(config)
    for step, said in ranks.run(restore, config):
        assert step == 1
        assert said == [
            f"skipped checkpoint-000002: {newest} must be undamaged to be fetched"
        ]


def set_environment(variables):
    os.environ.update(variables)
    store.connect.cache_clear()


def train_and_save(config, folder):
    mesh = build_mesh(config.dp_size, config.tp_size, config.device)
    engine = fsdp.build_engine(config, mesh)
    engine.save(folder)
    return {name: value.clone() for name, value in engine.local_weights().items()}


class Counted:
    """A file; notes how much each call reads."""

    def __init__(self, file, read: list[int]):
        self.file, self.counts = file, read

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.file.close()

    def __getattr__(self, name: str):
        method = getattr(self.file, name)
        if name not in ("read", "readinto"):
            return method

        def counting(*args):
            found = method(*args)
            self.counts.append(found if isinstance(found, int) else len(found))
            return found

        return counting


def load(config, folder):
    """Weights of this rank, and the bytes that it read from the store for them."""
    config = replace(config, seed=7)
    mesh = build_mesh(config.dp_size, config.tp_size, config.device)
    engine = fsdp.build_engine(config, mesh)
    for value in engine.local_weights().values():
        value.zero_()
    read, open_file = [], store.RemotePath.open

    def counted(path, mode, buffering=-1):
        return Counted(open_file(path, mode, 0), read)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(store.RemotePath, "open", counted)
        engine.load(folder)
    return engine.local_weights(), sum(read)


def test_each_rank_reads_its_own_slices(runs, demo_paths, tmp_path, pools):
    ranks, (where, variables) = pools(2), runs
    ranks.run(set_environment, variables)
    config = make_config(demo_paths, tmp_path, 2, 1)
    folder = f"{where}/slices"
    saved = ranks.run(train_and_save, config, folder)
    sizes = store.files(store.path(folder))
    shards = [size for name, size in sizes.items() if name.endswith(".distcp")]
    assert len(shards) == 2
    loaded = ranks.run(load, config, folder)
    for (values, read), before in zip(loaded, saved, strict=True):
        assert all(torch.equal(values[name], before[name]) for name in before)
        assert 0.5 * min(shards) < read < 1.02 * max(shards) + 2 * sizes[".metadata"]


def save_beside_a_failing_store(config, folder):
    mesh = build_mesh(config.dp_size, config.tp_size, config.device)
    engine = fsdp.build_engine(config, mesh)
    engine.save(folder)


def test_a_store_that_fails_for_a_while_is_asked_again(
    server, demo_paths, tmp_path, pools
):
    ranks, folder = pools(2), f"{RUNS}/failing"
    ranks.run(set_environment, server.environment)
    config = make_config(demo_paths, tmp_path, 2, 1)
    with server.failing("503 Slow Down", seconds=3):
        ranks.run(save_beside_a_failing_store, config, folder)
    assert server.refused > 0
    assert (
        sum(name.endswith(".distcp") for name in store.files(store.path(folder))) == 2
    )


def test_a_store_that_refuses_is_one_sentence_in_the_driver(
    server, demo_paths, tmp_path
):
    config = make_config(demo_paths, tmp_path, 1, 1)
    for name, value in (
        ("storage_path", "s3://no-such-bucket/runs"),
        ("export_to", "s3://no-such-bucket/model"),
        ("storage_path", "nfs://somewhere/runs"),
    ):
        with pytest.raises(ConfigError, match=f"{name}='{value}' must be a bucket"):
            storage.check(replace(config, cache_dir=str(tmp_path), **{name: value}))
    with server.failing("403 Forbidden", seconds=60):
        with pytest.raises(ConfigError, match=r"these credentials may use .*ACCESS"):
            storage.check(replace(config, cache_dir=str(tmp_path), storage_path=RUNS))
        with pytest.raises(ConfigError, match=r"storage_path='s3:.* must be readable"):
            cli.read_config({"resume_from": "run", "storage_path": RUNS, "tp_size": 1})
    with pytest.raises(ConfigError, match=r"resume_from_checkpoint='s3://.*has no man"):
        storage.check(replace(config, resume_from_checkpoint=f"{RUNS}/none"))
    with pytest.raises(ConfigError, match="cache_dir='s3://b' must be a folder on a d"):
        TrainConfig(cache_dir="s3://b")


def test_a_dataset_in_a_store_is_copied_once(runs, demo_paths, tmp_path):
    where, _ = runs
    data = f"{where}/data"
    for path in Path(demo_paths[1]).rglob("*"):
        if path.is_file():
            name = path.relative_to(demo_paths[1])
            store.copy(path, store.path(data) / name)
    settings = {"cache_dir": str(tmp_path / "cache"), "dataset_percentage": 5}
    local = make_config(demo_paths, tmp_path, 1, 1, **settings)
    remote = replace(local, dataset_name=data)
    rows = launch.prepare(remote).prepared_data
    assert launch.prepare(remote).prepared_data == rows
    assert len(list((tmp_path / "cache" / "fetched").glob("*[0-9a-f]"))) == 1
    same = Path(launch.prepare(local).prepared_data, "input_ids.npy").read_bytes()
    assert Path(rows, "input_ids.npy").read_bytes() == same
    twice = launch.prepare(replace(local, dataset_name=f"{data}, {data}"))
    assert len(np.load(Path(twice.prepared_data, "input_ids.npy"))) > len(
        np.load(Path(rows, "input_ids.npy"))
    )
    with pytest.raises(ConfigError, match=r"there is no such folder as \S+/none"):
        launch.prepare(replace(local, dataset_name=f"{data},{where}/none"))


def test_in_a_store_the_manifest_makes_the_checkpoint(runs, demo_paths, tmp_path):
    where, _ = runs
    config = make_config(demo_paths, tmp_path, 1, 1, run_name="names")
    config = replace(config, storage_path=where, cache_dir=str(tmp_path))
    for step in (2, 4, 6):
        partial = manifest.partial_folder(config, step)
        (partial / "weights.distcp").write_bytes(b"weights")
        (partial / saving.STATE_FILE).write_text("{}")
        if step < 6:
            manifest.publish(partial, {}, {"step": step})
    assert checkpoint.last_of(config) == f"{where}/names/checkpoint-000004"
    last = checkpoint.as_checkpoint(checkpoint.last_of(config))
    assert store.from_ray(last) == checkpoint.last_of(config)
    manifest.remove_leftovers(config)
    assert [p.name[-1] for p in manifest.checkpoints(config)] == ["4", "2"]
    assert not store.files(manifest.partial_folder(config, 6))
    newest = manifest.checkpoints(config)[0]
    (newest / "weights.distcp").write_bytes(b"weight")
    with pytest.raises(CheckpointError, match="must have 7 bytes, but has 6"):
        manifest.verify(newest)
    assert checkpoint.last_of(config) == f"{where}/names/checkpoint-000002"
    (newest / "weights.distcp").write_bytes(b"weights")
    (newest / saving.STATE_FILE).write_text("[]")
    with pytest.raises(CheckpointError, match=r"state\.json must be as it was"):
        manifest.verify(newest)
    manifest.prune(replace(config, save_total_limit=1), 4)
    assert [p.name[-1] for p in manifest.checkpoints(config)] == ["4"]
