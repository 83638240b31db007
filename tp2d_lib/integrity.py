"""Digests of files: taken while they are written, compared before they are loaded."""

from __future__ import annotations

import hashlib
import io
import os
from pathlib import Path

from tp2d_lib import store


class HashedFile(io.BufferedWriter):
    """A new file that is hashed while it is written, so that it is never read again."""

    total = 0  # bytes that this process has written so far, which shows its progress

    def __init__(self, path: str | Path):
        super().__init__(store.path(path).open("wb", buffering=0), 1 << 20)
        self.path, self.sha256 = key(path), hashlib.sha256()

    def write(self, data) -> int:
        self.sha256.update(data)
        written = super().write(data)
        HashedFile.total += written
        return written

    def seek(self, *_):
        raise io.UnsupportedOperation("a file that is hashed is written in order")

    def close(self) -> None:
        if not self.closed:
            super().close()
            WRITTEN[self.path] = self.sha256.hexdigest()


WRITTEN: dict[str, str] = {}  # SHA-256 of this process's hashed files, by path


def key(path: object) -> str:
    return str(path) if store.is_remote(path) else os.path.abspath(path)


def take_written(directory: Path) -> dict[str, dict]:
    """Size and SHA-256 of the hashed files in a folder, by name; forgets them."""
    start = f"{key(directory)}/"
    names = [path.removeprefix(start) for path in WRITTEN if path.startswith(start)]
    return {name: entry(directory / name, WRITTEN.pop(start + name)) for name in names}


def entry(path: Path, sha256: str | None = None) -> dict:
    """What a manifest records of a file."""
    return {"size": path.stat().st_size, "sha256": sha256 or digest(path)}


def digest(path: Path) -> str:
    sha256 = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            sha256.update(block)
    return sha256.hexdigest()
