"""How distributed checkpoints are written, hashed on the way, and read as data."""

from __future__ import annotations

import io
import operator
import pickle
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint import (
    FileSystemReader,
    FileSystemWriter,
    LoadPlan,
    LoadPlanner,
    Metadata,
)
from torch.distributed.checkpoint.filesystem import FileSystem
from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions
from torch.futures import Future

from tp2d_lib import store
from tp2d_lib.checkpoint import plain
from tp2d_lib.integrity import HashedFile

DCP = "torch.distributed.checkpoint"
METADATA = {  # what PyTorch's .metadata is made of, besides the types of tensors
    f"{DCP}.filesystem": ("_StorageInfo",),
    f"{DCP}.metadata": (
        "BytesStorageMetadata",
        "ChunkStorageMetadata",
        "Metadata",
        "MetadataIndex",
        "StorageMeta",
        "TensorProperties",
        "TensorStorageMetadata",
        "_MEM_FORMAT_ENCODING",
    ),
    "pathlib": ("PosixPath",),
    "torch": ("Size",),
    "torch.serialization": ("_get_layout",),
}


class HashingFileSystem(FileSystem):
    """PyTorch's, on disk or in a store; the shards are hashed as they are written."""

    @contextmanager
    def create_stream(self, path, mode):
        hashed = mode == "wb" and str(path).endswith(".distcp")
        # From a store no more is read than is asked for.
        buffering = 0 if mode == "rb" and store.is_remote(path) else -1
        with HashedFile(path) if hashed else path.open(mode, buffering) as stream:
            yield stream

    def concat_path(self, path, suffix):
        return path / suffix

    def init_path(self, path):
        return store.path(path)

    def mkdir(self, path):
        path.mkdir(parents=True, exist_ok=True)

    def exists(self, path):
        return path.is_file()

    def rename(self, path, new_path):
        path.rename(new_path)


class HashingWriter(FileSystemWriter):
    """PyTorch's writer, with our file system."""

    def __init__(self, path: str):
        super().__init__(path, sync_files=not store.is_remote(path))
        self.fs = HashingFileSystem()
        self.path = store.path(path)

    @property
    def checkpoint_id(self) -> str:  # PyTorch records it
        return str(self.path)


class MetadataUnpickler(pickle.Unpickler):
    """Builds what ``METADATA`` names and nothing else."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("builtins", "getattr"):
            return operator.getitem  # Python 3.11.0 to 3.11.3: a member of an Enum
        is_dtype = module == "torch" and isinstance(vars(torch).get(name), torch.dtype)
        if is_dtype or name in METADATA.get(module, ()):
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"GLOBAL {module}.{name}")


class PlainReader(FileSystemReader):
    """PyTorch's reader; it refuses a checkpoint that would run code.

    Raises:
        CheckpointError: what it holds besides tensors and plain values.
    """

    def __init__(self, path: str):
        super().__init__(path)
        self.fs = HashingFileSystem()
        self.path = store.path(path)

    def read_metadata(self) -> Metadata:
        path = self.path / ".metadata"
        with plain.only(path), path.open("rb") as file:
            return MetadataUnpickler(file).load()

    def _slice_file(self, file, place):
        """One request for each tensor, where reading it bit by bit would be many."""
        if isinstance(self.path, Path):
            return super()._slice_file(file, place)
        file.seek(place.offset)
        return io.BytesIO(file.read(place.length))

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        with plain.only(self.path):
            return super().read_data(plan, planner)


def copying_stager(device: torch.device) -> DefaultStager:
    """What copies state for an asynchronous checkpoint; from a GPU, to pinned memory.

    It keeps that memory, so only one write may be under way.
    """
    on_gpu = device.type == "cuda"
    options = StagingOptions(
        use_pinned_memory=on_gpu,
        use_non_blocking_copy=on_gpu,
        use_async_staging=False,  # the next step changes what is copied
        use_shared_memory=False,  # a thread writes, not a process
    )
    return DefaultStager(options)
