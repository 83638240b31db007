"""Checkpoints through Ray Train: commit, restore, report, read the history."""

from __future__ import annotations

import json
import threading
from collections import ChainMap
from collections.abc import Callable
from functools import cache
from pathlib import Path

import ray.train
import torch.distributed as dist
from ray.train import CheckpointUploadMode

from tp2d_lib.checkpoint import lease, manifest, resume
from tp2d_lib.checkpoint.manifest import STATE_FILE, CheckpointError
from tp2d_lib.config import TrainConfig
from tp2d_lib.integrity import take_written

WRITING = threading.Lock()


def commit(engine, state: dict, config: TrainConfig) -> None:
    """Save the engine and the loop's state as one checkpoint; every rank must call it.

    All ranks write into one folder of the run's storage. Once all have, rank 0 writes
    the manifest and gives the folder its name; until then the previous checkpoint is
    the newest. With ``async_checkpoint`` this happens in threads while training
    continues.

    Args:
        state: ``step``, ``position`` in the sample stream, ``history`` of log records.
    """
    lease.check(config)
    WRITING.acquire()  # until the one before is published: its turn to communicate
    partial = manifest.partial_folder(config, state["step"])
    partial.mkdir(parents=True, exist_ok=True)
    group = group_of_writers()
    written = engine.save(partial)
    text = json.dumps(state)  # now, because the history grows
    about = {key: state[key] for key in ("step", "position")}
    if dist.get_rank() == 0:
        about |= resume.about(engine.name, config)

    def publish(local: ray.train.Checkpoint, name: str) -> ray.train.Checkpoint:
        try:
            if written:
                written.result()
            files = [None] * dist.get_world_size() if dist.get_rank() == 0 else None
            dist.gather_object(take_written(partial), files, group=group)
            if files is not None:
                lease.check(config)  # again: writing may have taken long
                (partial / STATE_FILE).write_text(text)
                manifest.publish(partial, ChainMap(*files), about)
                manifest.prune(config, about["step"])
        finally:
            WRITING.release()
        return ray.train.Checkpoint(str(partial.with_name(name)))

    report(
        {**state["history"][-1], "step": state["step"]},
        config,
        checkpoint=ray.train.Checkpoint(str(partial)),
        checkpoint_dir_name=f"checkpoint-{state['step']:06d}",
        checkpoint_upload_fn=publish,
        delete_local_checkpoint_after_upload=False,
    )


@cache
def group_of_writers() -> dist.ProcessGroup:
    """A group of all ranks that training does not share with threads that write."""
    return dist.new_group(backend="gloo")


def report(metrics: dict, config: TrainConfig, **checkpoint) -> None:
    """Report to Ray without waiting for a checkpoint that is still being written.

    Ray handles reports in order, so a synchronous report would wait for it.
    """
    mode = CheckpointUploadMode["ASYNC" if config.async_checkpoint else "SYNC"]
    ray.train.report(metrics, checkpoint_upload_mode=mode, **checkpoint)


def restore(engine, config: TrainConfig, notify: Callable[[str], None]) -> dict:
    """Load the newest undamaged checkpoint of the run, or the one that it starts from.

    Every rank must call it: each verifies a share of the files.

    Args:
        notify: is told which checkpoints were skipped, and why.

    Returns:
        The state that was committed, or that of step 0.

    Raises:
        CheckpointError: there are checkpoints, but all are damaged.
    """
    folders = manifest.checkpoints(config)
    if not folders and config.resume_from_checkpoint:
        folders = [Path(config.resume_from_checkpoint)]
    if not folders:
        return {"step": 0, "position": 0, "history": []}
    for folder in folders:
        error = verify_together(folder)
        if error is None:
            engine.load(folder)
            return json.loads((folder / STATE_FILE).read_text())
        notify(f"skipped {folder.name}: {error}")
    raise resume.nothing_left(config, error)


def verify_together(folder: Path) -> str | None:
    """What is wrong with a checkpoint; the same answer on every rank."""
    error = None
    try:
        manifest.verify(folder, part=dist.get_rank(), parts=dist.get_world_size())
    except CheckpointError as damage:
        error = str(damage)
    answers = [None] * dist.get_world_size()
    dist.all_gather_object(answers, error)
    return next((answer for answer in answers if answer), None)


def history(result: ray.train.Result) -> list[dict]:
    """The log records of a finished run, from its last checkpoint."""
    with result.checkpoint.as_directory() as folder:
        return json.loads((Path(folder) / STATE_FILE).read_text())["history"]
