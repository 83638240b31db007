"""What makes a folder a checkpoint: a manifest, written last."""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from uuid import uuid4

from tp2d_lib import store
from tp2d_lib.config import TrainConfig, first_line
from tp2d_lib.integrity import digest, entry
from tp2d_lib.validation import UserError

MANIFEST = "manifest.json"
STATE_FILE = "trainer_state.json"
CONVERTED = "converted-"  # begins the name of a copy for another layout
PARTIAL = ".partial"  # ends the name of a folder that is being written or deleted
OLD = ".old-"  # in the name of a folder that is being deleted
SHARDS = (".distcp", ".pt")  # end the names of the large files
Folder = Path | store.RemotePath

kept: set[Folder] = set()  # what could not be deleted, of which the user was told


class CheckpointError(UserError, RuntimeError):
    """A checkpoint on disk is not what was written, or there is none to load."""


class NotFetchedError(CheckpointError):
    """The driver could not fetch a checkpoint from a store whole; no rank loads it."""


def run_folder(config: TrainConfig) -> Folder:
    return store.path(config.storage_path) / (config.run_name or "")


def partial_folder(config: TrainConfig, step: int) -> Folder:
    """Where the checkpoint of a step is written until it is complete.

    A store cannot rename a folder: there it has its name from the start.
    """
    suffix = "" if store.is_remote(config.storage_path) else PARTIAL
    return run_folder(config) / f"checkpoint-{step:06d}{suffix}"


def publish(partial: Folder, hashed: Mapping[str, dict], about: dict) -> Folder:
    """Write the manifest and give the folder its name: now it is a checkpoint.

    Args:
        hashed: size and SHA-256 of the large files, by name; the others are read here.
        about: what else the manifest records.
    """
    entries = {
        name: hashed.get(name) or entry(partial / name)
        for name in sorted(store.files(partial))
    }
    content = {**about, "files": entries}
    text = json.dumps({"sha256": digest_of(content), **content}, indent=1)
    if not isinstance(partial, Path):
        (partial / MANIFEST).write_text(text)
        return partial
    with open(partial / MANIFEST, "w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    folder = partial.with_name(partial.name.removesuffix(PARTIAL))
    if folder.exists():  # a damaged one, which the run went back behind
        set_aside(folder)  # `prune` deletes it
    return partial.rename(folder)


def digest_of(content: dict) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def read(folder: str | Path) -> dict:
    """The manifest of a checkpoint.

    Raises:
        CheckpointError: there is none, or it has changed.
    """
    path = store.path(folder) / MANIFEST
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
    manifest, sizes = read(folder), store.files(store.path(folder))
    for name, stored in manifest["files"].items():
        if (size := sizes.get(name)) != stored["size"]:
            found = "is missing" if size is None else f"has {size:,} bytes"
            raise CheckpointError(
                f"{folder}/{name} must have {stored['size']:,} bytes, but {found}"
            )
    return manifest


def verify(folder: str | Path, part: int = 0, parts: int = 1) -> None:
    """Compare share ``part`` of ``parts`` of the files with the manifest.

    In a store, which checks its own files, only the sizes of the shards: whoever loads
    a checkpoint shall read no more than it needs.

    Raises:
        CheckpointError: the manifest or a file is missing or has changed.
    """
    files = check(folder)["files"]
    if store.is_remote(folder):
        files = {k: v for k, v in files.items() if not k.endswith(SHARDS)}
    for name in sorted(files, key=lambda name: files[name]["size"])[part::parts]:
        path = store.path(folder) / name
        if digest(path) != files[name]["sha256"]:
            raise CheckpointError(f"{path} must be as it was written, but has changed")


def checksums(folder: str | Path) -> dict[str, str]:
    """The recorded SHA-256 of every file of a checkpoint, by name."""
    return {name: file["sha256"] for name, file in read(folder)["files"].items()}


def checkpoints(config: TrainConfig) -> list[Folder]:
    """The run's checkpoints, newest first, whether damaged or not."""
    found = [folder for folder in folders(config) if is_whole(folder)]
    return sorted(found, key=step_of, reverse=True)


def folders(config: TrainConfig) -> list[Folder]:
    """The run's checkpoints, whole or half written or half deleted."""
    run, named = run_folder(config), re.compile(rf"checkpoint-\d{{6,}}(.*{PARTIAL})?")
    return [run / name for name in store.names(run) if named.fullmatch(name)]


def is_whole(folder: Folder) -> bool:
    """Whether it was completed: on disk its name tells, in a store its manifest."""
    if isinstance(folder, Path):
        return folder.suffix != PARTIAL
    return (folder / MANIFEST).is_file()


def step_of(folder: Folder) -> int:
    return int(re.findall(r"\d+", folder.name)[0])


def last_of(config: TrainConfig) -> str | None:
    """Path of the newest checkpoint whose files are all there, or None."""
    for folder in checkpoints(config):
        try:
            check(folder)
        except CheckpointError:
            continue
        return str(folder)
    return None


def prune(config: TrainConfig, step: int, notify: Callable = print) -> None:
    """Delete checkpoints beyond ``save_total_limit``, oldest first, and converted ones.

    Also what could not be deleted before. Those after ``step`` do not count: damaged
    ones that the run went back behind, and one that ranks may have begun to write.
    """
    found = sorted(folders(config), key=step_of)
    found = [folder for folder in found if step_of(folder) <= step]
    newest = list(filter(is_whole, found))[-config.save_total_limit :]
    for folder in found:
        if folder not in newest:
            remove(folder, notify)
    remove_converted(config, notify)


def remove(folder: Folder, notify: Callable[[str], None]) -> None:
    """Delete a folder that is of no use; say, once, if it cannot be deleted.

    Training needs none of it, and will try again: a file may be open on another node.
    """
    try:
        folder = set_aside(folder)
        store.remove_tree(folder)
    except OSError as error:
        if folder not in kept:
            kept.add(folder)
            notify(f"{folder} cannot be deleted yet ({first_line(error)})")


def set_aside(folder: Folder) -> Folder:
    """From now on a folder is no checkpoint, and on disk its name is free."""
    if not isinstance(folder, Path):
        with suppress(FileNotFoundError):  # half deleted, or never completed
            (folder / MANIFEST).unlink()
        return folder
    if OLD in folder.name:
        return folder
    return folder.rename(f"{folder}{OLD}{uuid4().hex[:8]}{PARTIAL}")


def local_folder(config: TrainConfig) -> Path:
    """On a disk that every node sees: the run's folder, or one for a run in a store."""
    folder = run_folder(config)
    return (
        folder
        if isinstance(folder, Path)
        else config.data_dir / store.local_name(folder)
    )


def remove_converted(config: TrainConfig, notify: Callable = print) -> None:
    """Delete copies made to begin on another layout, once they are not needed."""
    for folder in local_folder(config).glob(f"{CONVERTED}*"):
        remove(folder, notify)


def remove_leftovers(config: TrainConfig, notify: Callable = print) -> None:
    """Delete what a dead attempt left half written or half deleted."""
    for folder in folders(config):
        if not is_whole(folder):
            remove(folder, notify)
