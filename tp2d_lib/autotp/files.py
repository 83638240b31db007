"""How DeepSpeed's checkpoints are written, hashed on the way, and read as data."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from deepspeed.runtime.checkpoint_engine import TorchCheckpointEngine
from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler, LossScaler
from deepspeed.runtime.zero.config import ZeroStageEnum
from deepspeed.utils.tensor_fragment import fragment_address

from tp2d_lib import store
from tp2d_lib.checkpoint import plain
from tp2d_lib.checkpoint.manifest import Folder
from tp2d_lib.integrity import HashedFile

# What DeepSpeed's own files hold besides tensors and plain values.
ALLOWED = (DynamicLossScaler, LossScaler, ZeroStageEnum, fragment_address)


class HashingCheckpointEngine(TorchCheckpointEngine):
    """DeepSpeed's own; the files are hashed while they are written."""

    moved = "", ""  # a folder on disk, and the one in a store that takes its place

    def save(self, state_dict, path: str) -> None:
        with HashedFile(path.replace(*self.moved)) as file:
            torch.save(state_dict, file)

    @contextmanager
    def writing_to(self, directory: Folder) -> Iterator[Path]:
        """The folder for DeepSpeed to write to, which writes small files by itself."""
        if isinstance(directory, Path):
            yield directory
            return
        with tempfile.TemporaryDirectory(prefix="tp2d-") as folder:
            self.moved = folder, str(directory)
            yield Path(folder)
            self.moved = "", ""
            for name in store.files(Path(folder)):
                store.copy(Path(folder, name), directory / name)


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
