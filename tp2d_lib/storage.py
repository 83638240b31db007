"""A run's folder, on a disk that all nodes share or in a remote store."""

from __future__ import annotations

import os
from pathlib import Path

from pyarrow.fs import FileSystem

from tp2d_lib.config import TrainConfig


def uri(path: str) -> str:
    return path if "://" in path else os.path.abspath(path)


def has(folder: str, name: str) -> bool:
    """Whether a folder, local or remote, has this file."""
    files, path = FileSystem.from_uri(uri(folder))
    return files.get_file_info(f"{path}/{name}").is_file


def write(config: TrainConfig, name: str, content: bytes) -> None:
    """Write a file into the run's folder; ``name`` may contain folders."""
    files, storage = FileSystem.from_uri(uri(config.storage_path))
    path = f"{storage}/{config.run_name}/{name}"
    files.create_dir(str(Path(path).parent))
    # Left to itself, Arrow compresses what is called .gz once more.
    with files.open_output_stream(path, compression=None) as file:
        file.write(content)
