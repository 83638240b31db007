"""Tables: a cell of CSV is text, and Arrow's values are what they are.

A key of a struct which a row does not use is not there.
"""

from __future__ import annotations

import csv
import sys
from collections.abc import Iterator

from tp2d_lib.config import first_line
from tp2d_lib.data.plain import DataError, Records, Wanted, opened, text_of

BATCH = 1000  # rows of a table read together
SAMPLE = 1 << 20  # bytes of CSV that show its separator and its quotes


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


def arrow_columns(path: str) -> list[str]:
    return next(arrow_batches(path)).names
