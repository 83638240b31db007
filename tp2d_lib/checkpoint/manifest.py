"""What makes a folder a checkpoint: a manifest, written last."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from collections.abc import Mapping
from pathlib import Path

from tp2d_lib.config import TrainConfig
from tp2d_lib.integrity import digest, entry
from tp2d_lib.validation import UserError

MANIFEST = "manifest.json"
STATE_FILE = "trainer_state.json"
CONVERTED = "converted-"  # begins the name of a copy for another layout
PARTIAL = ".partial"  # ends the name of a folder that is being written or deleted


class CheckpointError(UserError, RuntimeError):
    """A checkpoint on disk is not what was written, or there is none to load."""


def run_folder(config: TrainConfig) -> Path:
    return Path(config.storage_path, config.run_name or "")


def partial_folder(config: TrainConfig, step: int) -> Path:
    """Where the checkpoint of a step is written until it is complete."""
    return run_folder(config) / f"checkpoint-{step:06d}{PARTIAL}"


def publish(partial: Path, hashed: Mapping[str, dict], about: dict) -> Path:
    """Write the manifest and give the folder its name: now it is a checkpoint.

    Args:
        hashed: size and SHA-256 of the large files, by name; the others are read here.
        about: what else the manifest records.
    """
    paths = sorted(path for path in partial.rglob("*") if path.is_file())
    files = {str(path.relative_to(partial)): path for path in paths}
    entries = {name: hashed.get(name) or entry(path) for name, path in files.items()}
    content = {**about, "files": entries}
    with open(partial / MANIFEST, "w") as file:
        json.dump({"sha256": digest_of(content), **content}, file, indent=1)
        file.flush()
        os.fsync(file.fileno())
    folder = partial.with_name(partial.name.removesuffix(PARTIAL))
    if folder.exists():  # a damaged one, which the run went back behind
        remove(folder)
    return partial.rename(folder)


def digest_of(content: dict) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def read(folder: str | Path) -> dict:
    """The manifest of a checkpoint.

    Raises:
        CheckpointError: there is none, or it has changed.
    """
    path = Path(folder, MANIFEST)
    try:
        content = json.loads(path.read_bytes())
        if content.pop("sha256") == digest_of(content):
            return content
    except FileNotFoundError:
        raise CheckpointError(
            f"{folder} must hold {MANIFEST}, which a complete checkpoint does"
        ) from None
    except (ValueError, KeyError, TypeError, AttributeError):
        pass  # it is not even JSON
    raise CheckpointError(f"{path} must be as it was written, but has changed")


def check(folder: str | Path) -> dict:
    """The manifest of a checkpoint whose files all exist with their sizes.

    Raises:
        CheckpointError: the manifest or a file is missing or has changed.
    """
    manifest = read(folder)
    for name, stored in manifest["files"].items():
        path = Path(folder, name)
        size = path.stat().st_size if path.is_file() else None
        if size != stored["size"]:
            found = "is missing" if size is None else f"has {size:,} bytes"
            raise CheckpointError(
                f"{path} must have {stored['size']:,} bytes, but {found}"
            )
    return manifest


def verify(folder: str | Path, part: int = 0, parts: int = 1) -> None:
    """Compare share ``part`` of ``parts`` of the files with the manifest.

    Raises:
        CheckpointError: the manifest or a file is missing or has changed.
    """
    files = check(folder)["files"]
    for name in sorted(files, key=lambda name: files[name]["size"])[part::parts]:
        path = Path(folder, name)
        if digest(path) != files[name]["sha256"]:
            raise CheckpointError(f"{path} must be as it was written, but has changed")


def checksums(folder: str | Path) -> dict[str, str]:
    """The recorded SHA-256 of every file of a checkpoint, by name."""
    return {name: file["sha256"] for name, file in read(folder)["files"].items()}


def checkpoints(config: TrainConfig) -> list[Path]:
    """The run's checkpoints, newest first, whether damaged or not."""
    found = [
        path
        for path in run_folder(config).glob("checkpoint-*")
        if re.fullmatch(r"checkpoint-\d{6,}", path.name)
    ]
    return sorted(found, key=step_of, reverse=True)


def step_of(folder: Path) -> int:
    return int(folder.name.split("-")[1])


def last_of(config: TrainConfig) -> str | None:
    """Path of the newest checkpoint whose files are all there, or None."""
    for folder in checkpoints(config):
        try:
            check(folder)
        except CheckpointError:
            continue
        return str(folder)
    return None


def prune(config: TrainConfig, step: int) -> None:
    """Delete checkpoints beyond ``save_total_limit``, oldest first, and converted ones.

    Those after ``step`` do not count: damaged ones that the run went back behind.
    """
    written = [folder for folder in checkpoints(config) if step_of(folder) <= step]
    for folder in written[config.save_total_limit :]:
        remove(folder)
    remove_converted(config)


def remove(folder: Path) -> None:
    """Delete a checkpoint; one that is half deleted no longer bears its name."""
    shutil.rmtree(folder.rename(f"{folder}.old{PARTIAL}"))


def remove_converted(config: TrainConfig) -> None:
    """Delete copies made to begin on another layout, once they are not needed."""
    for folder in run_folder(config).glob(f"{CONVERTED}*"):
        shutil.rmtree(folder)


def remove_leftovers(config: TrainConfig) -> None:
    """Delete what a dead attempt left half written or half deleted."""
    for folder in run_folder(config).glob(f"checkpoint-*{PARTIAL}"):
        shutil.rmtree(folder)
