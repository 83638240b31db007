"""A run's folder, on a disk that all nodes share or in a remote store."""

from __future__ import annotations

import os
import shutil
import time
from pathlib import Path
from uuid import uuid4

from pyarrow.fs import FileSystem

from tp2d_lib.checkpoint.manifest import MANIFEST
from tp2d_lib.config import ConfigError, TrainConfig


def has(folder: str, name: str) -> bool:
    """Whether a folder, local or remote, has this file."""
    files, path = FileSystem.from_uri(folder)
    return files.get_file_info(f"{path}/{name}").is_file


def read(folder: str, name: str) -> bytes:
    """The content of a file in a folder, local or remote."""
    files, path = FileSystem.from_uri(folder)
    with files.open_input_stream(f"{path}/{name}", compression=None) as file:
        return file.read()


def append(config: TrainConfig, name: str, document: str) -> None:
    """Add a YAML document, the newest last, to a file in the run's folder."""
    folder = f"{config.storage_path}/{config.run_name}"
    earlier = read(folder, name).decode() if has(folder, name) else ""
    started = time.strftime("%Y-%m-%d %H:%M:%S")
    write(config, name, f"{earlier}--- # {started}\n{document}".encode())


def remove(config: TrainConfig, name: str) -> None:
    """Delete a file of the run's folder, if it exists."""
    folder = f"{config.storage_path}/{config.run_name}"
    if has(folder, name):
        files, path = FileSystem.from_uri(folder)
        files.delete_file(f"{path}/{name}")


def write(config: TrainConfig, name: str, content: bytes) -> None:
    """Write a file into the run's folder; ``name`` may contain folders."""
    files, storage = FileSystem.from_uri(config.storage_path)
    path = f"{storage}/{config.run_name}/{name}"
    files.create_dir(str(Path(path).parent))
    partial = f"{path}.{uuid4().hex}.tmp"  # two may write one lease at the same time
    # By default, Arrow would compress a .gz file a second time.
    with files.open_output_stream(partial, compression=None) as file:
        file.write(content)
    files.move(partial, path)  # as a whole: a reader never sees half of it


def check(config: TrainConfig) -> None:
    """Find in the driver what workers could not read or write.

    Raises:
        ConfigError: a folder is not writable, or the checkpoint to start from does not
            exist.
    """
    for name in ("storage_path", "cache_dir", "export_to"):
        path = getattr(config, name)
        if path is not None and "://" not in path:
            check_writable(name, path)
    path = config.resume_from_checkpoint
    if path is not None and not has(path, MANIFEST):
        raise ConfigError(
            f"resume_from_checkpoint={path!r} must be a checkpoint of an earlier run, "
            f"but has no {MANIFEST}; try a folder such as run/checkpoint-000100"
        )


def check_space(config: TrainConfig, needed: int, what: str = "checkpoint") -> None:
    """Find in the driver that not even one checkpoint fits on the disk.

    Args:
        needed: bytes that it has at least.
    """
    path = config.storage_path
    if "://" in path:
        return
    home = next(p for p in Path(path, "file").parents if p.exists())
    free = shutil.disk_usage(home).free
    if free < needed:
        raise ConfigError(
            f"storage_path={path!r} must have at least {needed / 1e9:,.1f} GB free for "
            f"a {what}, but has {free / 1e9:,.1f} GB; delete what is not needed, "
            "or try another storage_path"
        )


def check_writable(name: str, path: str) -> None:
    """Check that a local folder is writable, or can be created."""
    ways = [Path(path, "file")]
    if name == "export_to":  # written beside it first
        ways.append(Path(f"{path}.partial"))
    for way in ways:
        home = next(parent for parent in way.parents if os.path.exists(parent))
        if not (home.is_dir() and os.access(home, os.W_OK | os.X_OK)):
            raise ConfigError(
                f"{name}={path!r} must be a writable folder, but {str(home)!r} is "
                f"not; try {name}='/tmp/tp2d'"
            )
