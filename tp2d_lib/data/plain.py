"""Files as bytes, texts and JSON: nothing is inferred, and no type is changed.

JSON values are Python's. A text file is one record. Files are read in pieces, but for
JSON that is no lines, which is read at once.
"""

from __future__ import annotations

import bz2
import gzip
import io
import json
import lzma
import os
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager

from tp2d_lib.config import first_line

Records = Iterator[tuple[int, dict]]  # with a number, which ``place`` makes a place
Wanted = set[str] | None  # names of the columns to read, of all if None


class DataError(ValueError):
    """What is wrong with a file, and where, to be put into a sentence."""


@contextmanager
def told(path: str):
    """Say which file cannot be read; each format and compression has its own errors."""
    try:
        yield
    except DataError:
        raise
    except Exception as error:
        raise DataError(f"{path} cannot be read ({first_line(error)})") from error


def only_member(path: str):
    archive = zipfile.ZipFile(path)
    names = [name for name in archive.namelist() if not name.endswith("/")]
    if len(names) != 1:
        raise DataError(f"{path} holds {len(names)} files instead of one; unpack it")
    return archive.open(names[0])


def by_arrow(path: str):
    import pyarrow  # here: slow, workers do not need it

    return io.BufferedReader(pyarrow.input_stream(path, compression="detect"))


COMPRESSED = {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open, ".zip": only_member}
COMPRESSED |= {".zst": by_arrow, ".lz4": by_arrow}


def opened(path: str):
    """The bytes of a file, unpacked."""
    unpack = COMPRESSED.get(os.path.splitext(path)[1].lower())
    return unpack(path) if unpack else open(path, "rb")


def text_of(data: bytes, path: str, line: int = 1) -> str:
    """Bytes as text, without a byte order mark; ``line`` is the number of the first."""
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        number = line + data.count(b"\n", 0, error.start)
        byte = f"the byte {data[error.start]:#04x}, which is not UTF-8"
        raise DataError(f"line {number} of {path} has {byte}") from error


def of_text(path: str, _: Wanted) -> Records:
    with opened(path) as file:
        yield 1, {"text": text_of(file.read(), path)}


def of_lines(path: str, _: Wanted) -> Records:
    """JSON, an object in each line."""
    with opened(path) as lines:
        for number, line in enumerate(lines, start=1):
            if line.strip():
                place = f"line {number} of {path}"
                yield (
                    number,
                    object_of(parse(text_of(line, path, number), place), place),
                )


def of_json(path: str, _: Wanted) -> Records:
    """JSON: a list of objects, an object that holds such a list, or lines after all."""
    with opened(path) as file:
        text = text_of(file.read(), path)
    first, _, rest = text.strip().partition("\n")
    if rest and is_object(first):
        yield from of_lines(path, None)
        return
    value = parse(text, path)
    if isinstance(value, dict):
        lists = [each for each in value.values() if is_table(each)]
        value = lists[0] if len(lists) == 1 else [value]
    for number, each in enumerate(value if isinstance(value, list) else [value], 1):
        yield number, object_of(each, f"record {number} of {path}")


def is_object(line: str) -> bool:
    try:
        return isinstance(json.loads(line), dict)
    except ValueError:
        return False


def is_table(value: object) -> bool:
    """Whether it is a list of records, and not of the messages of one."""
    is_list = isinstance(value, list) and all(isinstance(v, dict) for v in value)
    return is_list and not any({"role", "from"} & {*each} for each in value)


def parse(text: str, place: str) -> object:
    try:
        return DECODER.decode(text)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{place} is not JSON ({first_line(error)})") from error


def refuse_constant(name: str):
    raise ValueError(f"{name} is no number of JSON")


DECODER = json.JSONDecoder(parse_constant=refuse_constant)


def object_of(value: object, place: str) -> dict:
    if not isinstance(value, dict):
        raise DataError(f"{place} holds {type(value).__name__} instead of an object")
    return value
