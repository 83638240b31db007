"""A dataset's files: found by the name that the user gives, opened by ``datasets``."""

from __future__ import annotations

import glob
import hashlib
import json
import os
from itertools import chain
from pathlib import Path
from typing import NamedTuple

from filelock import FileLock

from tp2d_lib import store
from tp2d_lib.config import ConfigError, TrainConfig, first_line

# A text file is one document, with its newlines, and without a byte order mark.
TEXT = "text", {"sample_by": "document", "encoding": "utf-8-sig"}
FORMATS = {  # a file's extension -> the loader of ``datasets``, and what it is told
    ".jsonl": ("json", {}),
    ".ndjson": ("json", {}),
    ".json": ("json", {}),
    ".csv": ("csv", {"keep_default_na": False}),  # a text "NA" is one
    ".tsv": ("csv", {"keep_default_na": False, "sep": "\t"}),
    ".parquet": ("parquet", {}),
    ".arrow": ("arrow", {}),
    ".txt": TEXT,
    ".md": TEXT,
}
COMPRESSED = (".gz", ".bz2", ".xz", ".zst", ".lz4", ".zip")
NO_DATA = ("README.md", "LICENSE", "state.json", "dataset_info.json", "_dict.json")
WILD = "*?["


class Source(NamedTuple):
    """What ``datasets`` will read, one builder for each format, and what it will not.

    ``files`` are those of the builders, as far as they are local; ``left_out`` are
    files beside them that hold no data, or that belong to no split.
    """

    builders: list
    files: list[str]
    left_out: list[str]


def open_source(config: TrainConfig) -> Source:
    """The dataset that the configuration names, before any row of it is read.

    It may be a file, a folder, a glob, several of these with commas between them, a
    folder written by ``save_to_disk``, or a name on the Hub.

    Raises:
        ConfigError: there is none, or it holds no file of a format that can be read.
    """
    try:
        own = [on_disk(name, config) for name in names(config.dataset_name)]
        parts = [of_part(name, config) for name in own]
        source = Source(*map(list, map(chain.from_iterable, zip(*parts, strict=True))))
        if not source.builders:
            raise FileNotFoundError(f"none holds data: {listed(source.left_out)}")
        return source
    except Exception as error:  # each format is read by another library
        where = config.dataset_name
        if config.dataset_config:
            where += f" ({config.dataset_config})"
        raise ConfigError(
            f"dataset_name={where!r} must be a file, a folder with data files or a "
            f"dataset on the Hub; try 'Salesforce/wikitext' ({first_line(error)})"
        ) from error


def names(name: str) -> list[str]:
    """The names in a list with commas; a file's own name may have commas, too."""
    return [name] if os.path.exists(name) else [n.strip() for n in name.split(",")]


def on_disk(name: str, config: TrainConfig) -> str:
    """The name, or of data in a store a copy on disk, which later runs find again."""
    if not name.startswith(("s3://", "gs://")):
        return name
    folder = store.path(name)
    found = [(i.path, i.size, i.mtime_ns) for i in store.listing(folder)]
    if not found:
        raise FileNotFoundError(f"there is no such folder as {name}")
    version = hashlib.sha256(repr(sorted(found)).encode()).hexdigest()[:16]
    target = config.data_dir / "fetched" / version
    target.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{target}.lock"):
        return str(target if target.exists() else store.fetch(folder, target))


def of_part(name: str, config: TrainConfig) -> Source:
    """The source of one name."""
    folder = Path(name)
    if any(sign in name for sign in WILD) and not folder.exists():
        found = sorted(filter(os.path.isfile, glob.glob(name, recursive=True)))
        return of_files({"train": found}, found)
    if folder.is_file():
        return of_files({"train": [name]}, [name])
    if not folder.is_dir():
        if folder.is_absolute() or format_of(name):
            raise FileNotFoundError(f"there is no {name}")
        return of_hub(name, config)
    if config.dataset_config or has_configurations(folder):
        return of_hub(name, config)
    beside = [str(p) for p in sorted(folder.rglob("*")) if p.is_file()]
    beside = [path for path in beside if "/." not in path.removeprefix(name)]
    return of_files(saved_splits(folder) or splits_of(name), beside)


def of_hub(name: str, config: TrainConfig) -> Source:
    """``datasets`` decides; of text files it would make a document of each line."""
    from datasets import load_dataset_builder  # here: slow, workers do not need it

    builder = load_dataset_builder(name, config.dataset_config)
    if builder.name == "text":
        _, options = TEXT
        builder = load_dataset_builder(name, config.dataset_config, **options)
    return Source([builder], [], [])


def of_files(splits: dict[str, list[str]], beside: list[str]) -> Source:
    """One builder for each format of the files, which are grouped by split."""
    from datasets import load_dataset_builder  # here: slow, workers do not need it

    formats: dict[str, tuple] = {}
    for split, files in splits.items():
        for file in files:
            if (kind := format_of(file)) and os.path.getsize(file):
                _, _, grouped = formats.setdefault(repr(kind), (*kind, {}))
                grouped.setdefault(split, []).append(file)
    grouped_files = chain(*(grouped.values() for *_, grouped in formats.values()))
    read = list(chain(*grouped_files))
    left_out = sorted(set(beside) - set(read))
    left_out = [file for file in left_out if not file.endswith(NO_DATA)]
    builders = [
        load_dataset_builder(loader, data_files=grouped, **options)
        for loader, options, grouped in formats.values()
    ]
    return Source(builders, read, left_out)


def format_of(file: str) -> tuple[str, dict] | None:
    """The loader of a file and its options, by its extension."""
    name = file.lower()
    for ending in COMPRESSED:
        name = name.removesuffix(ending)
    return FORMATS.get(os.path.splitext(name)[1])


def has_configurations(folder: Path) -> bool:
    """Whether a folder's README says, for ``datasets``, which files belong together."""
    from huggingface_hub import DatasetCard  # here: slow, workers do not need it

    card = folder / "README.md"
    if not card.is_file() or not card.read_bytes().startswith(b"---"):
        return False
    return bool(DatasetCard.load(card).data.get("configs"))


def saved_splits(folder: Path) -> dict[str, list[str]] | None:
    """The files of a dataset written by ``save_to_disk``, by split."""
    if (folder / "dataset_dict.json").is_file():
        known = json.loads((folder / "dataset_dict.json").read_bytes())["splits"]
        return {s: f for n in known for s, f in {n: saved(folder / n)}.items()}
    return {"train": saved(folder)} if (folder / "state.json").is_file() else None


def saved(folder: Path) -> list[str]:
    files = json.loads((folder / "state.json").read_bytes())["_data_files"]
    return [str(folder / file["filename"]) for file in files]


def splits_of(folder: str) -> dict[str, list[str]]:
    """The files of a folder by split, as ``datasets`` tells them from their names."""
    from datasets.data_files import DataFilesDict, get_data_patterns

    return DataFilesDict.from_patterns(get_data_patterns(folder), base_path=folder)


def listed(files: list[str]) -> str:
    """A few names of files, and how many more there are."""
    shown = ", ".join(os.path.basename(file) for file in files[:3]) or "no file"
    return shown + f" and {len(files) - 3} more" * (len(files) > 3)


def fault(files: list[str], column: str | None) -> str | None:
    """The first line of the files that holds no document, or None; reads all of them.

    Args:
        column: what each JSON object must hold as text; None: anything.
    """
    import fsspec  # here: slow, workers do not need it

    for file in files:
        loader, _ = format_of(file) or (None, None)
        if loader not in ("json", "csv", "text"):
            continue
        whole = file.lower().endswith(".json")
        with fsspec.open(file, "rb", compression="infer") as lines:
            parts = [lines.read()] if whole else lines
            for number, part in enumerate(parts, start=1):
                if wrong := fault_of(part, column, loader):
                    return f"{file if whole else f'line {number} of {file}'} {wrong}"
    return None


def fault_of(line: bytes, column: str | None, loader: str) -> str | None:
    try:
        text = line.decode("utf-8-sig")
        if loader != "json" or not text.strip():
            return None
        value = json.loads(text)
    except UnicodeDecodeError as error:
        return f"has the byte {line[error.start]:#04x}, which is not UTF-8"
    except ValueError as error:
        return f"is not JSON ({first_line(error)})"
    for each in value if isinstance(value, list) else [value]:
        if not isinstance(each, dict):
            return f"holds {type(each).__name__} instead of an object"
        if column and not isinstance(each.get(column), str | None):
            return f"holds {type(each[column]).__name__} in {column!r} instead of text"
    return None
