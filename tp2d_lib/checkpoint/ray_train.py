"""Checkpoints through Ray Train: commit, report, read the history."""

from __future__ import annotations

import json
from collections.abc import Callable

import ray.train
from ray.train import CheckpointUploadMode

from tp2d_lib import store
from tp2d_lib.checkpoint import saving
from tp2d_lib.checkpoint.manifest import STATE_FILE
from tp2d_lib.config import TrainConfig


def commit(
    engine, state: dict, config: TrainConfig, notify: Callable[[str], None]
) -> None:
    """Save a checkpoint and report it to Ray; every rank must call it.

    It lies in the run's storage already, so Ray uploads nothing. With
    ``async_checkpoint`` it is completed in a thread while training continues, and Ray,
    which handles reports in order, is not waited for either.

    Args:
        state: ``step``, ``position`` in the sample stream, ``history`` of log records.
        notify: is told which older ones cannot be deleted.
    """
    complete = saving.save(engine, state, config, notify)
    mode = CheckpointUploadMode["ASYNC" if config.async_checkpoint else "SYNC"]
    ray.train.report(
        {**state["history"][-1], "step": state["step"]},
        checkpoint_upload_mode=mode,
        checkpoint=as_checkpoint(config.storage_path),  # complete() tells where
        checkpoint_dir_name=f"checkpoint-{state['step']:06d}",
        checkpoint_upload_fn=lambda *_: as_checkpoint(complete()),
        delete_local_checkpoint_after_upload=False,
    )


def history(result: ray.train.Result) -> list[dict]:
    """The log records of a finished run, from its last checkpoint."""
    files, path = result.checkpoint.filesystem, result.checkpoint.path
    with files.open_input_stream(f"{path}/{STATE_FILE}") as file:
        return json.loads(file.read())["history"]


def as_checkpoint(place: object) -> ray.train.Checkpoint:
    """Ray's name for a folder on disk or in a store."""
    return ray.train.Checkpoint(*store.for_ray(place))
