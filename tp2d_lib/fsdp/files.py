"""How distributed checkpoints are written: hashed on the way."""

from __future__ import annotations

from contextlib import contextmanager

from torch.distributed.checkpoint import FileSystemWriter
from torch.distributed.checkpoint.filesystem import FileSystem

from tp2d_lib.integrity import HashedFile


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
