"""Records as a file has them, or a dataset on the Hub, by the ending of its name."""

from __future__ import annotations

import os
from collections.abc import Callable
from itertools import chain, islice
from pathlib import Path
from typing import NamedTuple

from tp2d_lib.data import plain, tables
from tp2d_lib.data.plain import COMPRESSED, Records, Wanted, told
from tp2d_lib.data.tables import BATCH, of_batches
from tp2d_lib.integrity import digest

ROW = "row {number} of {path}"
HEAD = 200  # records that show what a file holds


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


FORMATS = {
    ".jsonl": Format(plain.of_lines),
    ".ndjson": Format(plain.of_lines),
    ".json": Format(plain.of_json, "record {number} of {path}"),
    ".csv": Format(tables.of_csv),
    ".tsv": Format(tables.of_csv),
    ".parquet": Format(tables.of_parquet, ROW, tables.parquet_columns),
    ".arrow": Format(tables.of_arrow, ROW, tables.arrow_columns),
    ".txt": Format(plain.of_text, "{path}", lambda path: ["text"]),
    ".md": Format(plain.of_text, "{path}", lambda path: ["text"]),
}


def format_of(path: str) -> Format | None:
    """How a file is read, by its ending; None if it is not."""
    name, ending = os.path.splitext(path.lower())
    if ending in COMPRESSED:
        name, ending = os.path.splitext(name)
    return FORMATS.get(ending)
