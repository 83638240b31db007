"""Records as a file has them: nothing is inferred, and no type is changed.

JSON values are Python's, a cell of CSV is text, and Arrow's values are what they are,
but that a key of a struct which a row does not use is not there. A text file is one
record. Files are read in pieces, but for JSON that is no lines, which is read at once.
"""

from __future__ import annotations

import bz2
import csv
import gzip
import io
import json
import lzma
import os
import sys
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import chain, islice
from pathlib import Path
from typing import NamedTuple

from tp2d_lib.config import first_line
from tp2d_lib.integrity import digest

Records = Iterator[tuple[int, dict]]  # with a number, which ``place`` makes a place
Wanted = set[str] | None  # names of the columns to read, of all if None
HEAD = 200  # records that show what a file holds
BATCH = 1000  # rows of a table read together
SAMPLE = 1 << 20  # bytes of CSV that show its separator and its quotes


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


class Format(NamedTuple):
    """How files with one ending are read."""

    records: Callable[[str, Wanted], Records]
    place: str = "line {number} of {path}"
    columns: Callable[[str], list[str]] | None = None  # of a table with a schema


class File(NamedTuple):
    """A file of records."""

    path: str

    @property
    def format(self) -> Format:
        return format_of(self.path)

    def records(self, wanted: Wanted = None) -> Records:
        """All records; of a table only the wanted columns are read.

        Raises:
            DataError: names the line that is damaged.
        """
        with told(self.path):
            yield from self.format.records(self.path, wanted)

    def columns(self) -> list[str]:
        if self.format.columns:
            with told(self.path):
                return self.format.columns(self.path)
        head = islice(self.records(), HEAD)
        return list(dict.fromkeys(key for _, record in head for key in record))

    def place(self, number: int) -> str:
        return self.format.place.format(number=number, path=self.path)

    def size(self) -> int:
        return os.path.getsize(self.path)

    def digest(self) -> str:
        return digest(Path(self.path))


class HubTable(NamedTuple):
    """A split of a dataset on the Hub, as ``datasets`` has prepared it."""

    path: str
    builder: object
    split: str

    def records(self, wanted: Wanted = None) -> Records:
        table = self.builder.as_dataset(split=self.split)
        names = [n for n in table.column_names if wanted is None or n in wanted]
        batches = table.select_columns(names).with_format("arrow").iter(BATCH)
        return of_batches(chain.from_iterable(b.to_batches() for b in batches))

    def columns(self) -> list[str]:
        return list(self.builder.info.features)

    def place(self, number: int) -> str:
        return f"row {number} of {self.path}"

    def size(self) -> int:
        return self.builder.info.splits[self.split].num_bytes or 0

    def digest(self) -> str:
        return f"{self.builder.config_id} {self.builder.hash}"


# ---------------------------------------------------------------- bytes


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


# ---------------------------------------------------------------- text and JSON


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
        return json.loads(text, parse_constant=refuse_constant)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{place} is not JSON ({first_line(error)})") from error


def refuse_constant(name: str):
    raise ValueError(f"{name} is no number of JSON")


def object_of(value: object, place: str) -> dict:
    if not isinstance(value, dict):
        raise DataError(f"{place} holds {type(value).__name__} instead of an object")
    return value


# ---------------------------------------------------------------- tables


def of_csv(path: str, _: Wanted) -> Records:
    """A table of text, with a header."""
    csv.field_size_limit(sys.maxsize)
    with opened(path) as file:
        sample = file.read(SAMPLE)
        dialect = dialect_of(text_of(sample + file.readline(), path), len(sample))
    with opened(path) as file:
        lines = (text_of(line, path, n) for n, line in enumerate(file, start=1))
        rows = csv.reader(lines, **dialect)
        try:
            header = next(rows, [])
            for cells in filter(None, rows):
                if len(cells) > len(header):
                    wrong = f"has {len(cells)} cells, but its header {len(header)}"
                    raise DataError(f"line {rows.line_num} of {path} {wrong}")
                yield rows.line_num, dict(zip(header, cells, strict=False))
        except csv.Error as error:
            line = f"line {rows.line_num} of {path}"
            raise DataError(f"{line} is not CSV ({error})") from error


def dialect_of(sample: str, size: int) -> dict:
    """How a table separates and quotes: so that every row has the header's cells."""
    header = sample.partition("\n")[0]
    common = {"delimiter": max(",\t;|", key=header.count), "strict": True}
    ways = [{"quotechar": '"'}, {"quoting": csv.QUOTE_NONE}]
    if header.startswith("'"):
        ways.insert(0, {"quotechar": "'"})
    even = (way for way in ways if is_even(sample, common | way, size >= SAMPLE))
    return common | next(even, ways[0])


def is_even(sample: str, dialect: dict, cut: bool) -> bool:
    """Whether all rows are of one size, but for a last one that may be cut off."""
    lines = sample.splitlines(keepends=True)
    rows, sizes = csv.reader(lines, **dialect), []
    try:
        sizes += [len(cells) for cells in rows if cells]
    except csv.Error:
        if not cut or rows.line_num < len(lines):
            return False
    return len({*sizes[: -1 if cut else None]}) <= 1


def of_parquet(path: str, wanted: Wanted) -> Records:
    from pyarrow import parquet  # here: slow, workers do not need it

    file, done = parquet.ParquetFile(path, page_checksum_verification=True), 0
    names = [n for n in file.schema_arrow.names if wanted is None or n in wanted]
    for group in range(file.num_row_groups):
        batches = file.iter_batches(BATCH, [group], names)
        try:
            for number, record in of_batches(batches):
                yield done + number, record
        except (OSError, ValueError) as error:  # Arrow's are these, too
            where = f"row group {group + 1} of {path}"
            raise DataError(f"{where} cannot be read ({first_line(error)})") from error
        done += file.metadata.row_group(group).num_rows


def of_arrow(path: str, wanted: Wanted) -> Records:
    batches = arrow_batches(path)
    names = [n for n in next(batches).names if wanted is None or n in wanted]
    return of_batches(batch.select(names) for batch in batches)


def arrow_batches(path: str) -> Iterator:
    """The schema, then the batches: of Arrow's file format, or of its stream."""
    import pyarrow  # here: slow, workers do not need it

    with pyarrow.memory_map(path) as file:
        is_file = file.read(6) == b"ARROW1"
        file.seek(0)
        reader = (pyarrow.ipc.open_file if is_file else pyarrow.ipc.open_stream)(file)
        yield reader.schema
        if is_file:
            yield from map(reader.get_batch, range(reader.num_record_batches))
        else:
            yield from reader


def of_batches(batches: Iterator) -> Records:
    """The rows of Arrow's batches, without what they leave empty."""
    number = 0
    for batch in batches:
        for start in range(0, len(batch), BATCH):
            rows = batch.slice(start, BATCH).to_pylist(maps_as_pydicts="lossy")
            for number, row in enumerate(rows, start=number + 1):  # noqa: B020
                yield number, filled(row)


def filled(value: object) -> object:
    """A value without the keys that have none; bytes are text in UTF-8."""
    if isinstance(value, dict):
        return {key: filled(each) for key, each in value.items() if each is not None}
    if isinstance(value, list):
        return [filled(each) for each in value]
    return value.decode() if isinstance(value, bytes) else value


def parquet_columns(path: str) -> list[str]:
    from pyarrow import parquet  # here: slow, workers do not need it

    return parquet.read_schema(path).names


FORMATS = {
    ".jsonl": Format(of_lines),
    ".ndjson": Format(of_lines),
    ".json": Format(of_json, "record {number} of {path}"),
    ".csv": Format(of_csv),
    ".tsv": Format(of_csv),
    ".parquet": Format(of_parquet, "row {number} of {path}", parquet_columns),
    ".arrow": Format(
        of_arrow, "row {number} of {path}", lambda path: next(arrow_batches(path)).names
    ),
    ".txt": Format(of_text, "{path}", lambda path: ["text"]),
    ".md": Format(of_text, "{path}", lambda path: ["text"]),
}


def format_of(path: str) -> Format | None:
    """How a file is read, by its ending; None if it is not."""
    name, ending = os.path.splitext(path.lower())
    if ending in COMPRESSED:
        name, ending = os.path.splitext(name)
    return FORMATS.get(ending)
