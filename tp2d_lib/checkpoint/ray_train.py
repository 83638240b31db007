"""Checkpoints through Ray Train: commit, report, read the history."""

from __future__ import annotations

import json
from pathlib import Path

import ray.train
from ray.train import CheckpointUploadMode

from tp2d_lib.checkpoint import saving
from tp2d_lib.checkpoint.manifest import STATE_FILE
from tp2d_lib.config import TrainConfig


def commit(engine, state: dict, config: TrainConfig) -> None:
    """Save a checkpoint and report it to Ray; every rank must call it.

    It lies in the run's storage already, so Ray uploads nothing. With
    ``async_checkpoint`` it is completed in a thread while training continues.

    Args:
        state: ``step``, ``position`` in the sample stream, ``history`` of log records.
    """
    complete = saving.save(engine, state, config)
    report(
        {**state["history"][-1], "step": state["step"]},
        config,
        checkpoint=ray.train.Checkpoint(config.storage_path),  # complete() tells where
        checkpoint_dir_name=f"checkpoint-{state['step']:06d}",
        checkpoint_upload_fn=lambda *_: ray.train.Checkpoint(str(complete())),
        delete_local_checkpoint_after_upload=False,
    )


def report(metrics: dict, config: TrainConfig, **checkpoint) -> None:
    """Report to Ray without waiting for a checkpoint that is still being written.

    Ray handles reports in order, so a synchronous report would wait for it.
    """
    mode = CheckpointUploadMode["ASYNC" if config.async_checkpoint else "SYNC"]
    ray.train.report(metrics, checkpoint_upload_mode=mode, **checkpoint)


def history(result: ray.train.Result) -> list[dict]:
    """The log records of a finished run, from its last checkpoint."""
    with result.checkpoint.as_directory() as folder:
        return json.loads((Path(folder) / STATE_FILE).read_text())["history"]
