"""A run's folder, on a disk that all nodes share or in a remote store."""

from __future__ import annotations

import os
import shutil
import time
from pathlib import Path
from uuid import uuid4

from tp2d_lib import store
from tp2d_lib.checkpoint import manifest
from tp2d_lib.checkpoint.manifest import MANIFEST
from tp2d_lib.config import ConfigError, TrainConfig, first_line


def file(config: TrainConfig, name: str) -> manifest.Folder:
    return manifest.run_folder(config) / name


def append(config: TrainConfig, name: str, document: str) -> None:
    """Add a YAML document, the newest last, to a file in the run's folder."""
    path = file(config, name)
    earlier = path.read_text() if path.is_file() else ""
    started = time.strftime("%Y-%m-%d %H:%M:%S")
    write(config, name, f"{earlier}--- # {started}\n{document}".encode())


def remove(config: TrainConfig, name: str) -> None:
    """Delete a file of the run's folder, if it exists."""
    path = file(config, name)
    if path.is_file():
        path.unlink()


def write(config: TrainConfig, name: str, content: bytes) -> None:
    """Write a file into the run's folder; ``name`` may contain folders."""
    path = file(config, name)
    if not isinstance(path, Path):
        return path.write_bytes(content)  # as a whole, as below
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(f"{path}.{uuid4().hex}.tmp")  # two may write a lease at once
    partial.write_bytes(content)
    partial.rename(path)  # as a whole: a reader never sees half of it


def check(config: TrainConfig) -> None:
    """Find in the driver what workers could not read or write.

    Raises:
        ConfigError: a folder is not writable, or the checkpoint to start from does not
            exist.
    """
    for name in ("storage_path", "cache_dir", "export_to"):
        path = getattr(config, name)
        if path is not None:
            look = check_store if store.is_remote(path) else check_writable
            look(name, path)
    path = config.resume_from_checkpoint
    if path is not None and not has_manifest(path):
        raise ConfigError(
            f"resume_from_checkpoint={path!r} must be a checkpoint of an earlier run, "
            f"but has no {MANIFEST}; try a folder such as run/checkpoint-000100"
        )


def has_manifest(path: str) -> bool:
    try:
        return (store.path(path) / MANIFEST).is_file()
    except OSError as error:
        raise refused("resume_from_checkpoint", path, error) from error


def check_store(name: str, path: str) -> None:
    """Write a file into a store and delete it: there is no other way to find out."""
    probe = store.path(path) / f".writable-{uuid4().hex}"
    try:
        probe.write_bytes(b"")
        probe.unlink()
    except Exception as error:  # an unknown scheme, too
        raise refused(name, path, error) from error


def refused(name: str, path: str, error: Exception) -> ConfigError:
    example, variables = "s3", "AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY"
    if path.startswith("gs:"):
        example, variables = "gs", "GOOGLE_APPLICATION_CREDENTIALS"
    return ConfigError(
        f"{name}={path!r} must be a bucket that these credentials may use "
        f"({first_line(error)}); try {name}='{example}://bucket/runs', with "
        f"{variables} set"
    )


def check_space(config: TrainConfig, needed: int, what: str = "checkpoint") -> None:
    """Find in the driver that not even one checkpoint fits on the disk.

    Args:
        needed: bytes that it has at least.
    """
    path = config.storage_path
    if store.is_remote(path):
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
