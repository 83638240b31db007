"""Checkpoints through Ray Train: commit, restore, report, read the history."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

import ray.train
import torch.distributed as dist
from ray.train import CheckpointUploadMode

from tp2d_lib.checkpoint import storage
from tp2d_lib.checkpoint.integrity import STATE_FILE, verify, write_checksums
from tp2d_lib.config import ConfigError, TrainConfig


def commit(engine, state: dict, config: TrainConfig) -> None:
    """Save the engine and the loop's state as one checkpoint; every rank must call it.

    Each rank writes its shards to a folder of its own. Ray merges the folders in the
    run's storage and records the checkpoint once all ranks have reported; until then
    the previous one is the latest. With ``async_checkpoint`` all this happens in
    threads while training continues.

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
    """Report to Ray without waiting for a checkpoint that is still being written.

    Ray handles reports in order, so a synchronous report would wait for it.
    """
    mode = CheckpointUploadMode["ASYNC" if config.async_checkpoint else "SYNC"]
    ray.train.report(metrics, checkpoint_upload_mode=mode, **checkpoint)


def restore(engine, config: TrainConfig) -> dict:
    """Load the latest checkpoint, or the one to start from; every rank must call it.

    Returns:
        The state that was committed, or that of step 0.

    Raises:
        CheckpointError: a file is missing or its content has changed.
        ConfigError: it was written with other rows or another seed.
    """
    checkpoint = ray.train.get_checkpoint()
    if checkpoint is None and config.resume_from_checkpoint:
        checkpoint = ray.train.Checkpoint(config.resume_from_checkpoint)
    if checkpoint is None:
        return {"step": 0, "position": 0, "history": []}
    with checkpoint.as_directory() as folder:
        directory = Path(folder)
        verify(directory, part=dist.get_rank(), parts=dist.get_world_size())
        dist.barrier()  # no rank unpickles before all shares are verified
        state = json.loads((directory / STATE_FILE).read_text())
        check_same_samples(state, config, directory)
        engine.load(directory)
        return state


def check_same_samples(state: dict, config: TrainConfig, directory: object) -> None:
    """A position in the data has the same meaning only for the same rows and seed."""
    for name, now in samples_of(config).items():
        if state[name] != now:
            raise ConfigError(
                f"{name}={now!r} must be what {directory} was written with, "
                f"{state[name]!r}; set it back, or try another run_name"
            )


def samples_of(config: TrainConfig) -> dict:
    """What determines the stream of samples, besides the position in it."""
    return {"seed": config.seed, "prepared_data": Path(config.prepared_data).name}


def check_start(config: TrainConfig) -> None:
    """Find in the driver that a run cannot continue the samples of its checkpoint.

    Raises:
        ConfigError: it was written with other rows or another seed.
    """
    if start := start_of(config):
        state = json.loads(storage.read(start, STATE_FILE))
        check_same_samples(state, config, start)


def start_of(config: TrainConfig) -> str | None:
    """Path of the checkpoint that a run will load: its latest, or the one it names."""
    return last_of(config) or config.resume_from_checkpoint


def last_of(config: TrainConfig) -> str | None:
    """Path of the latest checkpoint that Ray recorded, so a complete one, or None."""
    run = f"{config.storage_path}/{config.run_name}"
    try:
        checkpoint = ray.train.Result.from_path(run).checkpoint
    except RuntimeError:  # no such run, or nothing recorded
        return None
    return checkpoint and checkpoint.path


def history(result: ray.train.Result) -> list[dict]:
    """The log records of a finished run, from its last checkpoint."""
    with result.checkpoint.as_directory() as folder:
        return json.loads((Path(folder) / STATE_FILE).read_text())["history"]
