"""Files that run a command when they are loaded without care."""

import io
import os
import pickle
from dataclasses import replace
from pathlib import Path

import torch


class Evil:
    """Unpickled, it creates the file ``marker``."""

    def __init__(self, marker: Path):
        self.marker = marker

    def __reduce__(self):
        return os.system, (f"touch {self.marker}",)


def spoil_metadata(folder: Path, marker: Path) -> None:
    (folder / ".metadata").write_bytes(pickle.dumps(Evil(marker)))


def spoil_item(folder: Path, marker: Path, name: str) -> None:
    """Let an item of a distributed checkpoint be a pickle of our own."""
    buffer = io.BytesIO()
    torch.save(Evil(marker), buffer)
    (folder / "evil.distcp").write_bytes(buffer.getvalue())
    metadata = pickle.loads((folder / ".metadata").read_bytes())
    for index, info in metadata.storage_data.items():
        if index.fqn == name:
            metadata.storage_data[index] = replace(
                info, relative_path="evil.distcp", offset=0, length=buffer.tell()
            )
    (folder / ".metadata").write_bytes(pickle.dumps(metadata))


def spoil_pt(folder: Path, marker: Path, pattern: str, **options) -> None:
    """Add an item to the files of ``torch.save`` that match the pattern."""
    for path in folder.rglob(pattern):
        content = torch.load(path, weights_only=False)
        torch.save({**content, "evil": Evil(marker)}, path, **options)
