"""What happens to files."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def empty(path: Path) -> None:
    path.write_bytes(b"")


DAMAGES = {"flip": flip, "truncate": truncate, "empty": empty, "delete": Path.unlink}


@contextmanager
def damaged(path: Path, damage: str) -> Iterator[None]:
    """A file that is damaged, and afterwards as it was."""
    content = path.read_bytes()
    DAMAGES[damage](path)
    try:
        yield
    finally:
        path.write_bytes(content)
