"""Checkpoints through Ray Train: commit, verify, restore, read the history."""

from __future__ import annotations

import hashlib
import json
import tempfile
from pathlib import Path

import ray.train
import torch.distributed as dist
from ray.train import CheckpointUploadMode

from tp2d_lib import storage
from tp2d_lib.config import ConfigError, TrainConfig

STATE_FILE = "trainer_state.json"


class CheckpointError(RuntimeError):
    """A checkpoint on disk is not what was written."""


def commit(engine, state: dict, config: TrainConfig) -> None:
    """Save the engine and the loop's state as one checkpoint; every rank calls.

    Each rank writes its shards to a folder of its own. Ray merges the folders in the
    run's storage and records the checkpoint after all ranks have arrived; until then
    the one before it is the last. With ``async_checkpoint`` all this happens in
    threads, while training goes on.

    Args:
        state: ``step``, ``position`` in the sample stream, ``history`` of log records.
    """
    directory = Path(tempfile.mkdtemp(prefix="tp2d-"))
    written = engine.save(directory)
    if dist.get_rank() == 0:
        (directory / STATE_FILE).write_text(json.dumps({**state, **samples_of(config)}))

    def upload(local: ray.train.Checkpoint, name: str) -> ray.train.Checkpoint:
        if written:
            written.result()
        write_checksums(directory)
        run = ray.train.get_context().get_storage()
        return run.persist_current_checkpoint(local, name)

    report(
        {**state["history"][-1], "step": state["step"]},
        config,
        checkpoint=ray.train.Checkpoint.from_directory(directory),
        checkpoint_dir_name=f"checkpoint-{state['step']:06d}",
        checkpoint_upload_fn=upload,
        delete_local_checkpoint_after_upload=True,
    )


def report(metrics: dict, config: TrainConfig, **checkpoint) -> None:
    """Report to Ray; behind a checkpoint that is still being written, without waiting.

    Ray takes reports in their order, so one that waited would wait for that checkpoint.
    """
    mode = CheckpointUploadMode["ASYNC" if config.async_checkpoint else "SYNC"]
    ray.train.report(metrics, checkpoint_upload_mode=mode, **checkpoint)


def restore(engine, config: TrainConfig) -> dict:
    """Load the run's last checkpoint, or the one it is to start from; all ranks call.

    Returns:
        The state that was committed, or a state at step 0.

    Raises:
        CheckpointError: a file is missing or its content has changed.
    """
    checkpoint = ray.train.get_checkpoint()
    if checkpoint is None and config.resume_from_checkpoint:
        checkpoint = ray.train.Checkpoint(config.resume_from_checkpoint)
    if checkpoint is None:
        return {"step": 0, "position": 0, "history": []}
    with checkpoint.as_directory() as folder:
        directory = Path(folder)
        verify(directory, part=dist.get_rank(), parts=dist.get_world_size())
        dist.barrier()  # nobody unpickles before everybody's share is verified
        state = json.loads((directory / STATE_FILE).read_text())
        check_same_samples(state, config, directory)
        engine.load(directory)
        return state


def check_same_samples(state: dict, config: TrainConfig, directory: Path) -> None:
    """A position in the data means the same only for the same rows and seed."""
    for name, now in samples_of(config).items():
        if state[name] != now:
            raise CheckpointError(
                f"{name}={now!r} must be what {directory} was written with, "
                f"{state[name]!r}; set it back, or try another run_name"
            )


def samples_of(config: TrainConfig) -> dict:
    """What decides the stream of samples, besides the position in it."""
    return {"seed": config.seed, "prepared_data": Path(config.prepared_data).name}


def write_checksums(directory: Path) -> None:
    """Record the SHA-256 of every file this rank wrote."""
    sums = {
        str(path.relative_to(directory)): digest(path)
        for path in sorted(directory.rglob("*"))
        if path.is_file()
    }
    name = f"checksums-{dist.get_rank()}.json"
    (directory / name).write_text(json.dumps(sums, indent=1))


def verify(directory: Path, part: int = 0, parts: int = 1) -> None:
    """Compare files with their checksums; one of ``parts`` ranks takes its share."""
    sums = checksums(directory)
    if STATE_FILE not in sums:
        raise CheckpointError(f"{directory} must hold {STATE_FILE}: it is not complete")
    for name in sorted(sums)[part::parts]:
        path = directory / name
        if not path.is_file() or digest(path) != sums[name]:
            raise CheckpointError(
                f"{path} must have the content that was written, but is missing or "
                f"changed; delete {directory} to resume from the checkpoint before it"
            )


def checksums(directory: str | Path) -> dict[str, str]:
    """The recorded SHA-256 of every file of a checkpoint, by name."""
    sums: dict[str, str] = {}
    for path in sorted(Path(directory).glob("checksums-*.json")):
        sums.update(json.loads(path.read_text()))
    return sums


def digest(path: Path) -> str:
    sha256 = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            sha256.update(block)
    return sha256.hexdigest()


def check_there(config: TrainConfig) -> None:
    """Find in the driver that the checkpoint to start from is not there."""
    path = config.resume_from_checkpoint
    if path is not None and not storage.has(path, STATE_FILE):
        raise ConfigError(
            f"resume_from_checkpoint={path!r} must be a checkpoint of an earlier run, "
            f"but has no {STATE_FILE}; try a folder such as run/checkpoint-000100"
        )


def last_of(config: TrainConfig) -> str | None:
    """The run's last checkpoint that Ray has recorded, which makes it a whole one."""
    run = f"{storage.uri(config.storage_path)}/{config.run_name}"
    try:
        checkpoint = ray.train.Result.from_path(run).checkpoint
    except RuntimeError:  # no such run, or nothing recorded
        return None
    return checkpoint and checkpoint.path


def history(result: ray.train.Result) -> list[dict]:
    """The log records of a finished run, from its last checkpoint."""
    with result.checkpoint.as_directory() as folder:
        return json.loads((Path(folder) / STATE_FILE).read_text())["history"]
