"""Checksums of a checkpoint's files: written with it, verified before it is loaded."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import torch.distributed as dist

STATE_FILE = "trainer_state.json"


class CheckpointError(RuntimeError):
    """A checkpoint on disk is not what was written."""


def write_checksums(directory: Path) -> None:
    """Record the SHA-256 of every file this rank wrote."""
    sums = {
        str(path.relative_to(directory)): digest(path)
        for path in sorted(directory.rglob("*"))
        if path.is_file()
    }
    name = f"checksums-{dist.get_rank()}.json"
    (directory / name).write_text(json.dumps(sums, indent=1))


def verify(directory: Path, part: int = 0, parts: int = 1) -> None:
    """Compare share ``part`` of ``parts`` of the files with their checksums."""
    sums = checksums(directory)
    if STATE_FILE not in sums:
        raise CheckpointError(f"{directory} must hold {STATE_FILE}: it is not complete")
    for name in sorted(sums)[part::parts]:
        path = directory / name
        if not path.is_file() or digest(path) != sums[name]:
            raise CheckpointError(
                f"{path} must have the content that was written, but is missing or "
                f"changed; delete {directory} to resume from the previous checkpoint"
            )


def checksums(directory: str | Path) -> dict[str, str]:
    """The recorded SHA-256 of every file of a checkpoint, by name."""
    sums: dict[str, str] = {}
    for path in sorted(Path(directory).glob("checksums-*.json")):
        sums.update(json.loads(path.read_text()))
    return sums


def digest(path: Path) -> str:
    sha256 = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            sha256.update(block)
    return sha256.hexdigest()
