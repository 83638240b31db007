"""Files on a disk that all nodes share, or in an object store: one way to both.

Arrow, which Ray needs anyway, speaks to S3 and Google Cloud Storage. It is imported
where a store is used, because an engine alone needs no Arrow.
"""

from __future__ import annotations

import hashlib
import io
import os
import shutil
from contextlib import suppress
from datetime import timedelta
from functools import lru_cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any


def path(place: object) -> Path | RemotePath:
    """A path on disk, or one in a store if it is a URI such as ``s3://bucket/runs``."""
    return RemotePath(str(place)) if is_remote(place) else Path(str(place))


def is_remote(place: object) -> bool:
    return "://" in str(place)


def local_name(place: RemotePath) -> str:
    """A name on a disk for what belongs to an address, and to no other one."""
    return f"{place.name}-{hashlib.sha256(str(place).encode()).hexdigest()[:8]}"


def for_ray(place: object) -> tuple[str, Any]:
    """A path and its Arrow file system as Ray takes them: none for one on disk."""
    if not is_remote(place):
        return str(place), None
    files, name = path(place).place
    return name, files


def from_ray(checkpoint: Any) -> str:
    """The address of a checkpoint of Ray's, the inverse of ``for_ray``."""
    schemes = {"s3": "s3://", "gcs": "gs://"}  # by Arrow's names of file systems
    return schemes.get(checkpoint.filesystem.type_name, "") + checkpoint.path


@lru_cache
def connect(scheme: str, bucket: str):
    """The Arrow file system of a bucket; it retries for about 100 seconds.

    Credentials, region and endpoint come from the environment, as for the AWS and
    Google command lines and Google's emulators. Arrow itself ignores AWS_ENDPOINT_URL.
    """
    from pyarrow import fs

    get = os.environ.get
    if scheme == "gs":
        protocol, _, host = (get("STORAGE_EMULATOR_HOST") or "").rpartition("://")
        return fs.GcsFileSystem(
            anonymous=bool(host),
            scheme=protocol or ("http" if host else "https"),
            endpoint_override=host or None,
            retry_time_limit=timedelta(seconds=100),
        )
    if scheme != "s3":
        return fs.FileSystem.from_uri(f"{scheme}://{bucket}")[0]
    endpoint = get("AWS_ENDPOINT_URL_S3") or get("AWS_ENDPOINT_URL")
    region = get("AWS_REGION") or get("AWS_DEFAULT_REGION")
    keys = {}
    if get("AWS_ACCESS_KEY_ID"):  # given along, so that other nodes need none
        keys["access_key"] = get("AWS_ACCESS_KEY_ID")
        keys["secret_key"] = get("AWS_SECRET_ACCESS_KEY")
        keys["session_token"] = get("AWS_SESSION_TOKEN")
    return fs.S3FileSystem(
        region=region or (None if endpoint else fs.resolve_s3_region(bucket)),
        endpoint_override=endpoint,
        retry_strategy=fs.AwsStandardS3RetryStrategy(max_attempts=10),
        **keys,
    )


class RemotePath:
    """What the project uses of ``pathlib.Path``, in a store; it is no ``PathLike``.

    A store has no folders, only names with slashes, and writes a file whole or not.
    """

    def __init__(self, uri: str):
        self.uri = uri.rstrip("/")

    def __str__(self) -> str:
        return self.uri

    __repr__ = __str__

    def __eq__(self, other: object) -> bool:
        return str(self) == str(other)

    def __hash__(self) -> int:
        return hash(self.uri)

    def __truediv__(self, name: object) -> RemotePath:
        return RemotePath(f"{self.uri}/{name}")

    @property
    def name(self) -> str:
        return self.uri.rpartition("/")[2]

    @property
    def parent(self) -> RemotePath:
        return RemotePath(self.uri.rpartition("/")[0])

    @property
    def place(self) -> tuple[Any, str]:
        """The file system, and the path in it: bucket and key."""
        scheme, _, rest = self.uri.partition("://")
        return connect(scheme, rest.partition("/")[0]), rest

    def stat(self) -> SimpleNamespace:
        files, name = self.place
        info = files.get_file_info(name)
        if not info.is_file:
            raise FileNotFoundError(self.uri)
        return SimpleNamespace(st_size=info.size)

    def is_file(self) -> bool:
        files, name = self.place
        return files.get_file_info(name).is_file

    def open(self, mode: str, buffering: int = -1) -> io.IOBase:
        """One of Arrow's files, behind Python's buffer unless ``buffering`` is 0."""
        files, name = self.place
        if mode == "wb":  # uploaded in parts while it is written
            # By default, Arrow would compress a .gz file a second time.
            raw = files.open_output_stream(name, compression=None)
            return io.BufferedWriter(raw, 1 << 20) if buffering else raw
        raw = files.open_input_file(name)
        return io.BufferedReader(raw, 1 << 20) if buffering else raw

    def read_bytes(self) -> bytes:
        with self.open("rb") as file:
            return file.read()

    def read_text(self, encoding: str = "utf-8") -> str:
        return self.read_bytes().decode(encoding)

    def write_bytes(self, content: bytes) -> None:
        with self.open("wb") as file:
            file.write(content)

    def write_text(self, text: str) -> None:
        self.write_bytes(text.encode())

    def mkdir(self, **_) -> None:
        """A store needs none."""

    def rename(self, target: RemotePath) -> RemotePath:
        """One file; a store copies it."""
        files, name = self.place
        files.move(name, target.place[1])
        return target

    def unlink(self) -> None:
        files, name = self.place
        files.delete_file(name)


def files(folder: Path | RemotePath) -> dict[str, int]:
    """The files below a folder: relative name -> size in bytes."""
    if isinstance(folder, Path):
        found = [path for path in folder.rglob("*") if path.is_file()]
        return {str(p.relative_to(folder)): p.stat().st_size for p in found}
    return {i.path[len(folder.place[1]) + 1 :]: i.size for i in listing(folder)}


def listing(folder: RemotePath) -> list:
    """Arrow's records of the files below a folder."""
    from pyarrow.fs import FileSelector

    store, name = folder.place
    which = FileSelector(name, allow_not_found=True, recursive=True)
    return [info for info in store.get_file_info(which) if info.is_file]


def names(folder: Path | RemotePath) -> list[str]:
    """What is directly in a folder; nothing if there is no such folder."""
    if isinstance(folder, Path):
        return [path.name for path in folder.iterdir()] if folder.is_dir() else []
    # From all files: what Arrow lists of Google's store by level omits folders.
    return sorted({name.partition("/")[0] for name in files(folder)})


def remove_tree(folder: Path | RemotePath) -> None:
    """Delete a folder, or as much of it as can be.

    Raises:
        OSError: something is left.
    """
    if isinstance(folder, Path):
        shutil.rmtree(folder, ignore_errors=True)
        if folder.exists():
            shutil.rmtree(folder)  # again, for the reason
        return
    store, name = folder.place
    with suppress(FileNotFoundError):  # Google's has no folder to delete at the end
        store.delete_dir(name)


def copy(source: Path | RemotePath, target: Path | RemotePath) -> None:
    """Copy one file between disk and store, piece by piece."""
    target.parent.mkdir(parents=True, exist_ok=True)
    with source.open("rb") as read, target.open("wb") as written:
        shutil.copyfileobj(read, written, 1 << 24)


def fetch(folder: RemotePath, target: Path) -> Path:
    """A copy on disk of a folder in a store, complete once it bears this name."""
    partial = target.with_name(f"{target.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    for name in files(folder):
        copy(folder / name, partial / name)
    return partial.rename(target)
