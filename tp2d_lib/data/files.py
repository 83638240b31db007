"""A dataset's files: found by the name that the user gives, and grouped by split."""

from __future__ import annotations

import glob
import hashlib
import json
import os
import re
from collections.abc import Iterator
from itertools import chain
from pathlib import Path
from typing import NamedTuple

from filelock import FileLock

from tp2d_lib import store
from tp2d_lib.config import ConfigError, TrainConfig, closest, first_line
from tp2d_lib.data.records import FORMATS, File, HubTable, format_of
from tp2d_lib.model.hub import cache_refused
from tp2d_lib.validation import several

NO_DATA = {"README.md", "LICENSE", "LICENSE.txt", "config.json", "state.json"}
NO_DATA |= {"dataset_info.json", "dataset_infos.json", "dataset_dict.json"}
WILD = "*?["
# Words in the names of files and folders, as on the Hub, and the splits they mean.
WORDS = {"train": "train", "training": "train"}
WORDS |= dict.fromkeys(("validation", "valid", "dev", "val"), "validation")
WORDS |= dict.fromkeys(("test", "testing", "eval", "evaluation"), "test")
SHARD = re.compile(r"(?:^|/)data/(\w[\w.]*)-\d{5}-of-\d{5}")  # as the Hub writes them
Splits = dict[str, list[str]]


class Dataset(NamedTuple):
    """The files of a split, or its tables on the Hub, and the files that are not read.

    The latter hold nothing, hold no data, or belong to no split.
    """

    parts: list[File | HubTable]
    left_out: list[str]  # names


def open_dataset(config: TrainConfig) -> Dataset:
    """The dataset that the configuration names, before any record of it is read.

    It may be a file, a folder, a glob, several of these with commas between them, a
    folder written by ``save_to_disk``, or a name on the Hub.

    Raises:
        ConfigError: there is none, it holds no file that can be read, or no such split.
    """
    try:
        found = [
            of_name(on_disk(n, config), config) for n in several(config.dataset_name)
        ]
    except Exception as error:  # Hub and stores raise anything
        raise cache_refused(error) or no_dataset(config, error) from error
    splits: dict[str, list] = {}
    for split, parts in chain.from_iterable(each.items() for each, _ in found):
        splits.setdefault(split, []).extend(parts)
    left_out = list(chain.from_iterable(rest for _, rest in found))
    if not splits:
        raise no_dataset(config, f"none holds data: {listed(left_out) or 'no file'}")
    if config.dataset_split not in splits:
        raise ConfigError(
            f"dataset_split={config.dataset_split!r} must be a split of "
            f"{config.dataset_name!r}, which has {', '.join(sorted(splits))}; "
            f"try {closest(config.dataset_split, sorted(splits))!r}"
        )
    return Dataset(splits[config.dataset_split], left_out)


def no_dataset(config: TrainConfig, error: object) -> ConfigError:
    name = config.dataset_name
    if config.dataset_config:
        name += f" ({config.dataset_config})"
    return ConfigError(
        f"dataset_name={name!r} must be a file, a folder with data files or a dataset "
        f"on the Hub ({first_line(error)}); try 'Salesforce/wikitext', or a path that "
        f"ends with one of {', '.join(FORMATS)}"
    )


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


def of_name(name: str, config: TrainConfig) -> tuple[dict[str, list], list[str]]:
    """What a name means: parts by split, and files that are not read.

    A path that exists is that path, whatever signs its name has.
    """
    path = Path(name)
    if path.is_file():
        return of_files({"train": [name]}, [name])
    if path.is_dir():
        beside = [p for p in walk(path) if os.path.basename(p) not in NO_DATA]
        return of_files(splits_of(path, beside, config), beside)
    if any(sign in name for sign in WILD):
        found = sorted(filter(os.path.isfile, glob.glob(name, recursive=True)))
        return of_files({"train": found}, found)
    if path.is_absolute() or format_of(name):
        raise FileNotFoundError(f"there is no {name}")
    return of_hub(name, config), []


def of_files(splits: Splits, beside: list[str]) -> tuple[dict[str, list], list[str]]:
    has_data = lambda file: format_of(file) and os.path.getsize(file)  # noqa: E731
    read = {split: list(filter(has_data, files)) for split, files in splits.items()}
    rest = set(beside) - {*chain.from_iterable(read.values())}
    left_out = sorted(map(os.path.basename, rest))
    return {s: list(map(File, files)) for s, files in read.items() if files}, left_out


def of_hub(name: str, config: TrainConfig) -> dict[str, list]:
    """``datasets`` decides; of text files it would make a document of each line."""
    from datasets import load_dataset_builder  # here: slow, workers do not need it

    given = {"name": config.dataset_config, "revision": config.dataset_revision}
    builder = load_dataset_builder(name, **given)
    if builder.name == "text":
        documents = {"sample_by": "document", "encoding": "utf-8-sig"}
        builder = load_dataset_builder(name, **given, **documents)
    builder.download_and_prepare()
    return {split: [HubTable(name, builder, split)] for split in builder.info.splits}


def walk(folder: Path) -> Iterator[str]:
    """All files of a folder, without hidden ones, in order."""
    for path in sorted(folder.rglob("*")):
        parts = path.relative_to(folder).parts
        if path.is_file() and not any(p.startswith((".", "__")) for p in parts):
            yield str(path)


def splits_of(folder: Path, files: list[str], config: TrainConfig) -> Splits:
    """A folder's files by split: as it says itself, or else as their names do.

    Where no name says anything, all are for training; beside files whose names do,
    others belong to no split.
    """
    if (known := folder / "dataset_dict.json").is_file():
        return {n: saved(folder / n) for n in json.loads(known.read_bytes())["splits"]}
    if (folder / "state.json").is_file():
        return {"train": saved(folder)}
    if config.dataset_config or has_configurations(folder):
        from datasets import load_dataset_builder  # here: slow

        builder = load_dataset_builder(str(folder), config.dataset_config)
        return {str(k): list(v) for k, v in builder.config.data_files.items()}
    splits: Splits = {}
    for file in files:
        if (split := split_of(os.path.relpath(file, folder))) and format_of(file):
            splits.setdefault(split, []).append(file)
    return splits or {"train": files}


def split_of(name: str) -> str | None:
    """The split that a path within a folder names; the last word that does decides."""
    if shard := SHARD.search(name):
        return shard[1]
    words = [WORDS.get(word) for word in re.split(r"[-._ /0-9]+", name.lower())]
    return next((split for split in reversed(words) if split), None)


def has_configurations(folder: Path) -> bool:
    """Whether a folder's README says, for ``datasets``, which files belong together."""
    from huggingface_hub import DatasetCard  # here: slow, workers do not need it

    card = folder / "README.md"
    if not card.is_file() or not card.read_bytes().startswith(b"---"):
        return False
    return bool(DatasetCard.load(card).data.get("configs"))


def saved(folder: Path) -> list[str]:
    """The files of a dataset written by ``save_to_disk``."""
    files = json.loads((folder / "state.json").read_bytes())["_data_files"]
    return [str(folder / file["filename"]) for file in files]


def listed(names: list[str]) -> str:
    """A few names, and how many more there are."""
    return ", ".join(names[:3]) + f" and {len(names) - 3} more" * (len(names) > 3)
