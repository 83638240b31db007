"""Rows on disk are what was written: compared with their checksums, or looked through.

Files are read in pieces: rows of 100 GB take no more memory than rows of 100 MB.
"""

from __future__ import annotations

import hashlib
import json
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import numpy as np

from tp2d_lib.config import ConfigError, TrainConfig, first_line
from tp2d_lib.integrity import entry
from tp2d_lib.model import load_model_config

FILES = ("input_ids.npy", "lengths.npy")
MASKS = ("loss_mask.npy", "starts.npy")  # where they are needed
CHECKSUMS = "rows.json"
PIECE = 1 << 24  # tokens looked at together


class DamageError(ValueError):
    """What is wrong with rows on disk, to be put into a sentence."""


class Rows(NamedTuple):
    """The files of rows, memory-mapped.

    ``input_ids`` is (rows, seq_length), ``lengths`` (rows,); ``loss_mask`` and
    ``starts``, of the first one's shape, are None if there is no such file.
    """

    input_ids: np.ndarray
    lengths: np.ndarray
    loss_mask: np.ndarray | None
    starts: np.ndarray | None


def present(directory: Path) -> list[str]:
    return [*FILES, *(name for name in MASKS if (directory / name).is_file())]


def write_checksums(directory: Path, about: str) -> int:
    """Record size and SHA-256 of each file, and the vocabulary they need; returns it.

    It is the smallest that has all token ids.

    Args:
        about: a line about the documents, kept for ``data.describe``.
    """
    files = {name: entry(directory / name) for name in present(directory)}
    needed = highest_token(directory) + 1
    content = {"vocabulary": needed, "files": files, "about": about}
    (directory / CHECKSUMS).write_text(json.dumps(content, indent=1))
    return needed


def about(directory: Path) -> str | None:
    """The line about the documents; None for rows that others have written."""
    path = directory / CHECKSUMS
    return json.loads(path.read_bytes()).get("about") if path.exists() else None


def vocabulary(directory: Path) -> int:
    """The vocabulary that rows need, once their files have been compared.

    Rows without checksums, written by others, are looked through instead.

    Raises:
        DamageError: a file has changed, or is none that ``data.prepare`` could write.
    """
    path = directory / CHECKSUMS
    if not path.exists():
        return highest_token(directory) + 1
    try:
        stored = json.loads(path.read_bytes())
        needed, files = int(stored["vocabulary"]), dict(stored["files"])
    except (ValueError, KeyError, TypeError) as error:
        raise DamageError(f"{CHECKSUMS} has changed") from error
    for name in sorted({*files, *present(directory)}):
        if not (directory / name).is_file():
            raise DamageError(f"{name} is missing")
        if entry(directory / name) != files.get(name):
            raise DamageError(f"{name} has changed")
    return needed


def digest(directory: Path) -> str:
    """Of what the rows hold, wherever they are; those of others are read for it."""
    path = directory / CHECKSUMS
    if path.exists():
        files = json.loads(path.read_bytes())["files"]
    else:
        stats = {name: (directory / name).stat() for name in present(directory)}
        files = {
            name: entry_of(directory / name, stat.st_size, stat.st_mtime_ns)
            for name, stat in stats.items()
        }
    return hashlib.sha256(json.dumps(files, sort_keys=True).encode()).hexdigest()


@lru_cache
def entry_of(path: Path, size: int, mtime_ns: int) -> dict:
    """Of a file that is read again only if it has changed."""
    return entry(path)


def highest_token(directory: Path) -> int:
    """The highest token id; both files are looked through.

    Raises:
        DamageError: no row, a negative id, or lengths that do not fit the rows.
    """
    rows, lengths, *_ = open_rows(directory)
    lowest, highest = bounds(lengths)
    if lowest < 1 or highest > rows.shape[1]:
        raise DamageError(f"lengths.npy holds lengths from {lowest} to {highest}")
    lowest, highest = bounds(rows)
    if lowest < 0:
        raise DamageError(f"input_ids.npy holds the token id {lowest}")
    return highest


def open_rows(directory: Path) -> Rows:
    """The files of rows, mapped into memory.

    Raises:
        DamageError: a file cannot be read, or the shapes do not fit.
    """
    rows, lengths = (open_array(directory / name, "iu") for name in FILES)
    if rows.ndim != 2 or lengths.shape != rows.shape[:1] or not rows.size:
        raise DamageError(f"the shapes are {rows.shape} and {lengths.shape}")
    masks = [
        open_array(directory / name, "b") if (directory / name).exists() else None
        for name in MASKS
    ]
    for name, mask in zip(MASKS, masks, strict=True):
        if mask is not None and mask.shape != rows.shape:
            raise DamageError(f"{name} has the shape {mask.shape}, not {rows.shape}")
    return Rows(rows, lengths, *masks)


def open_array(path: Path, kinds: str) -> np.ndarray:
    """A file of numbers of one of the kinds, mapped into memory.

    Raises:
        DamageError: it is missing, shorter than its header says, or of another type.
    """
    try:
        array = np.lib.format.open_memmap(path, mode="r")
    except Exception as error:  # a header is parsed as Python: it can fail in any way
        raise DamageError(
            f"{path.name} cannot be read ({first_line(error)})"
        ) from error
    if array.dtype.kind not in kinds:
        wanted = "integers" if "i" in kinds else "bools"
        raise DamageError(f"{path.name} holds {array.dtype}, not {wanted}")
    return array


def bounds(array: np.ndarray) -> tuple[int, int]:
    step = max(PIECE // int(np.prod(array.shape[1:])), 1)
    pieces = [array[start : start + step] for start in range(0, len(array), step)]
    return min(int(p.min()) for p in pieces), max(int(p.max()) for p in pieces)


def check_vocabulary(config: TrainConfig, needed: int) -> None:
    """Refuse token ids that the model has no embedding for.

    Raises:
        ConfigError: names the vocabulary, and the size that the rows need.
    """
    known = getattr(load_model_config(config), "vocab_size", None)
    if known is not None and needed > known:
        field = "prepared_data" if config.prepared_data else "model_name"
        raise ConfigError(
            f"{field}={getattr(config, field)!r} must yield token ids below {known}, "
            f"the vocabulary of {config.model_name!r}, but yields {needed - 1}; try "
            "the tokenizer that the model was saved with"
        )
