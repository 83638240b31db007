"""How DeepSpeed's checkpoints are written, hashed on the way, and read as data."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from deepspeed.runtime.checkpoint_engine import TorchCheckpointEngine
from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler, LossScaler
from deepspeed.runtime.zero.config import ZeroStageEnum
from deepspeed.utils.tensor_fragment import fragment_address

from tp2d_lib.checkpoint import plain
from tp2d_lib.integrity import HashedFile

# What DeepSpeed's own files hold besides tensors and plain values.
ALLOWED = (DynamicLossScaler, LossScaler, ZeroStageEnum, fragment_address)


class HashingCheckpointEngine(TorchCheckpointEngine):
    """DeepSpeed's own; the files are hashed while they are written."""

    def save(self, state_dict, path: str) -> None:
        with HashedFile(path) as file:
            torch.save(state_dict, file)


@contextmanager
def as_data(folder: Path) -> Iterator[None]:
    """Check every file of a checkpoint, then let nothing in it run while it is loaded.

    DeepSpeed would run what a file says; on all ranks, because all check all files.

    Raises:
        CheckpointError: the file that holds more than DeepSpeed writes.
    """
    for path in sorted(folder.rglob("*.pt")):
        plain.check(path, ALLOWED)
    with plain.only(folder, ALLOWED):
        yield
