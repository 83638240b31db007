"""Rows of tokens: tokenized once per run, kept in memory-mapped files."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from datetime import date
from pathlib import Path

from filelock import FileLock

from tp2d_lib.config import ConfigError, TrainConfig
from tp2d_lib.data import checks
from tp2d_lib.data.reading import FORMAT, load_tokenizer, notes, open_reading
from tp2d_lib.data.tokens import Reading, limit
from tp2d_lib.data.writing import write_rows


def check(config: TrainConfig) -> str:
    """Find, without tokenizing, what would make ``prepare`` fail.

    Returns:
        How documents will share rows: ``config.pack``, decided where it is "auto".

    Raises:
        ConfigError: the tokenizer or the dataset cannot be read, or lacks the split or
            the columns.
    """
    if config.prepared_data:
        return pack_of(check_prepared(config), config)
    tokenizer = load_tokenizer(config)
    reading = open_reading(config, tokenizer)
    limit(config, reading)
    return pack_for(config, reading)


def pack_for(config: TrainConfig, reading: Reading) -> str:
    if config.pack != "auto":
        return config.pack
    return "documents" if reading.is_masked else "stream"


def prepare(config: TrainConfig, keep_all: bool = False) -> Path:
    """Tokenize the dataset into rows, or find the rows of an earlier run.

    Runs in the driver, before any worker exists. When several processes call it at
    once, one works and the others wait. With ``keep_all``, for held-out data, a
    document that is longer than its own row gets as many as it needs. Rows that exist
    are read once and compared with their checksums; damaged ones are made again.

    Returns:
        A folder with ``input_ids.npy`` (rows, seq_length) int32, ``lengths.npy``
        (rows,) int32, the number of real tokens in each row, and their checksums; with
        ``loss_mask.npy`` (rows, seq_length) bool if some tokens are not trained on, and
        ``starts.npy`` of that shape if no document may look into another: whether a
        token is the first of one.

    Raises:
        ConfigError: the dataset cannot be read, lacks the columns, or yields no row;
            the rows given are damaged, or have token ids that the model has not.
    """
    if config.prepared_data:
        directory = check_prepared(config)
        try:
            checks.check_vocabulary(config, checks.vocabulary(directory))
        except checks.DamageError as error:
            raise not_rows(config, error) from error
        return directory
    tokenizer = load_tokenizer(config)
    reading = open_reading(config, tokenizer)
    pack = pack_for(config, reading)
    directory = folder_of(config, tokenizer, reading, pack, keep_all)
    if reading.day:  # of the run that made the rows first
        day = directory.name.partition("-")[2]
        reading = reading._replace(day=date.fromisoformat(day))
    make_folder(config.data_dir)
    with FileLock(f"{directory}.lock"):
        needed = vocabulary_of_found(directory)
        if needed is None:
            work = Path(tempfile.mkdtemp(dir=config.data_dir, prefix=".rows-"))
            try:
                about = write_rows(config, tokenizer, reading, work, pack, keep_all)
                about = "; ".join([about, *notes(config, reading)])
                os.chmod(work, 0o755)  # mkdtemp makes it private
                needed = checks.write_checksums(work, about)
                os.rename(work, directory)  # complete or not at all
            finally:
                shutil.rmtree(work, ignore_errors=True)
    checks.check_vocabulary(config, needed)
    return directory


def vocabulary_of_found(directory: Path) -> int | None:
    """That of the rows of an earlier run; None without any, or if they were damaged."""
    if not directory.exists():
        return None
    try:
        return checks.vocabulary(directory)
    except checks.DamageError as error:
        print(f"{directory} is made anew, because {error}", flush=True)
        shutil.rmtree(directory)
        return None


def check_prepared(config: TrainConfig) -> Path:
    """The folder of rows that the config names; its rows must have the right length."""
    directory = Path(config.prepared_data)
    try:
        _, length = checks.open_rows(directory).input_ids.shape
    except checks.DamageError as error:
        raise not_rows(config, error) from error
    if length != config.seq_length:
        raise ConfigError(
            f"prepared_data={config.prepared_data!r} must hold rows of "
            f"seq_length={config.seq_length}, but they have {length} tokens; "
            f"try seq_length={length}"
        )
    return directory


def pack_of(directory: Path, config: TrainConfig) -> str:
    """How documents share these rows: told by the files, or else by the config."""
    if checks.open_rows(directory).starts is not None:
        return "documents"
    return "none" if config.pack == "none" else "stream"


def not_rows(config: TrainConfig, error: checks.DamageError) -> ConfigError:
    return ConfigError(
        f"prepared_data={config.prepared_data!r} must be a folder written by "
        f"data.prepare, but {error}; try omitting it"
    )


def make_folder(directory: Path) -> None:
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(
            f"cache_dir={str(directory)!r} must be a writable folder "
            f"({error.strerror}); try cache_dir='/tmp/tp2d-data' on a single machine"
        ) from error


def folder_of(
    config: TrainConfig, tokenizer, reading: Reading, pack: str, keep_all: bool
) -> Path:
    """The folder of the rows: of one name for equal content, another after any change.

    A template's date is part of it: of the first run that made such rows.
    """
    parts = {
        "format": FORMAT,
        "tokenizer": tokenizer.backend_tokenizer.to_str(),
        "special": tokenizer.special_tokens_map,
        "template": tokenizer.chat_template,
        "end": tokenizer.eos_token_id,
        "dataset": [part.digest() for part in reading.dataset.parts],
        "forms": reading.forms,
        "parses": reading.parses,
        "percentage": config.dataset_percentage,
        "eval_fraction": config.eval_fraction,
        "train_on": config.train_on,
        "seq_length": config.seq_length,
        "pack": pack,
        "keep_all": keep_all,
    }
    content = json.dumps(parts, sort_keys=True, default=str)
    name = hashlib.sha256(content.encode()).hexdigest()[:16]
    if reading.day is None:
        return config.data_dir / name
    made = sorted(
        path for path in config.data_dir.glob(f"{name}-*-*-*") if path.is_dir()
    )
    return made[0] if made else config.data_dir / f"{name}-{reading.day}"


def describe(directory: Path) -> str:
    """One line about rows: documents, tokens, and all that was left out."""
    rows = len(checks.open_rows(directory).lengths)
    return checks.about(directory) or f"{rows:,} rows"
