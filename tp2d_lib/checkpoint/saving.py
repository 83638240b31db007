"""A checkpoint written by all ranks as one, and the newest good one restored."""

from __future__ import annotations

import errno
import json
import threading
from collections import ChainMap
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache

import torch.distributed as dist
import torch.distributed.checkpoint as dcp

from tp2d_lib.checkpoint import lease, manifest, resume
from tp2d_lib.checkpoint.manifest import STATE_FILE, CheckpointError, NotFetchedError
from tp2d_lib.config import TrainConfig
from tp2d_lib.integrity import take_written
from tp2d_lib.mesh import patient_group
from tp2d_lib.model import identity

WRITING = threading.Lock()


def save(
    engine, state: dict, config: TrainConfig, notify: Callable[[str], None] = print
) -> Callable[[], manifest.Folder]:
    """Save the engine and the loop's state in one folder; every rank must call it.

    All ranks write into the same folder of the run's storage. Once all have, rank 0
    writes the manifest and gives the folder its name; until then the checkpoint before
    it is the newest.

    Args:
        state: ``step``, ``position`` in the sample stream, ``history`` of log records.
        notify: is told which older ones cannot be deleted.

    Returns:
        What every rank must call to complete the checkpoint, in a thread if it likes;
        it returns the folder, which is complete when it has returned on rank 0.
    """
    lease.check(config)
    WRITING.acquire()  # until the one before is complete: its turn to communicate
    partial = manifest.partial_folder(config, state["step"])
    partial.mkdir(parents=True, exist_ok=True)
    group = group_of_writers()
    with errors_explained(partial):
        written = engine.save(partial)
    text = json.dumps(state)  # now, because the history grows
    about = {key: state[key] for key in ("step", "position")}
    if dist.get_rank() == 0:
        about |= resume.about(engine.name, config)

    def complete() -> manifest.Folder:
        try:
            with errors_explained(partial):
                if written:
                    written.result()
            files = [None] * dist.get_world_size() if dist.get_rank() == 0 else None
            dist.gather_object(take_written(partial), files, group=group)
            if files is not None:
                lease.check(config)  # again: writing may have taken long
                (partial / STATE_FILE).write_text(text)
                manifest.publish(partial, ChainMap(*files), about)
                manifest.prune(config, about["step"], notify)
        finally:
            WRITING.release()
        return partial.parent / partial.name.removesuffix(manifest.PARTIAL)

    return complete


def await_earlier() -> None:
    """Wait until the checkpoint before is complete, if a thread still writes it."""
    with WRITING:
        pass


@contextmanager
def errors_explained(folder: manifest.Folder) -> Iterator[None]:
    """Say what to do about a full disk, on the rank that finds it.

    PyTorch's CheckpointException is no Exception, so few would catch it.
    """
    try:
        yield
    except (OSError, dcp.CheckpointException) as error:
        failures = getattr(error, "failures", {0: (error, None)})
        cause = next(cause for cause, _ in failures.values())
        if isinstance(cause, OSError) and cause.errno in (errno.ENOSPC, errno.EDQUOT):
            raise CheckpointError(
                f"{folder.parent} must have space for a checkpoint, but the disk is "
                "full; the one before it is kept: delete other files, such as older "
                "runs, then resume, perhaps with a smaller save_total_limit"
            ) from error
        raise cause from error


group_of_writers = cache(patient_group)


def restore(engine, config: TrainConfig, notify: Callable[[str], None]) -> dict:
    """Load the newest undamaged checkpoint of the run, or the one that it starts from.

    Every rank must call it: each verifies a share of the files.

    Args:
        notify: is told which checkpoints were skipped, and why.

    Returns:
        The state that was committed, or that of step 0, and as ``restored`` the path of
        its checkpoint.

    Raises:
        CheckpointError: there are checkpoints, but all are damaged.
    """
    if dist.get_rank() == 0:
        identity.at_start(config)  # now: a checkpoint must not wait for it, or fail
    folders = resume.candidates(config)
    if not folders:
        return {"step": 0, "position": 0, "history": [], "restored": None}
    for folder in folders:
        error = verify_together(folder)
        if error is None:
            try:
                engine.load(folder)
                state = json.loads((folder / STATE_FILE).read_text())
                return {**state, "restored": str(folder)}
            except NotFetchedError as damage:  # on all ranks alike
                error = str(damage)
        notify(f"skipped {folder.name}: {error}")
    raise resume.nothing_left(config, error)


def verify_together(folder: manifest.Folder) -> str | None:
    """What is wrong with a checkpoint; the same answer on every rank."""
    error = None
    try:
        manifest.verify(folder, part=dist.get_rank(), parts=dist.get_world_size())
    except CheckpointError as damage:
        error = str(damage)
    answers = [None] * dist.get_world_size()
    dist.all_gather_object(answers, error)
    return next((answer for answer in answers if answer), None)
