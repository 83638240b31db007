"""How distributed checkpoints are written, hashed on the way, and read as data."""

from __future__ import annotations

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
from torch.futures import Future

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
    @contextmanager
    def create_stream(self, path, mode):
        if mode != "wb" or not str(path).endswith(".distcp"):
            with super().create_stream(path, mode) as stream:
                yield stream
            return
        with HashedFile(path) as stream:
            yield stream


class HashingWriter(FileSystemWriter):
    """PyTorch's writer; the shards are hashed while they are written."""

    def __init__(self, path: str):
        super().__init__(path)
        self.fs = HashingFileSystem()


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

    def read_metadata(self) -> Metadata:
        path = Path(self.path, ".metadata")
        with plain.only(path), open(path, "rb") as file:
            return MetadataUnpickler(file).load()

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        with plain.only(self.path):
            return super().read_data(plan, planner)
