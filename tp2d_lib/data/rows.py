"""Rows of tokens: tokenised once per run, kept in memory-mapped files."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from pathlib import Path

import numpy as np
from filelock import FileLock

from tp2d_lib.config import ConfigError, TrainConfig
from tp2d_lib.data import checks
from tp2d_lib.data.documents import (
    check_column,
    load_builder,
    load_documents,
    load_tokenizer,
    tokenize,
)


def check(config: TrainConfig) -> None:
    """Find, without tokenising, what would make ``prepare`` fail.

    Raises:
        ConfigError: the tokenizer or the dataset cannot be read, or lacks the split or
            the text column.
    """
    if config.prepared_data:
        check_prepared(config)
    else:
        load_tokenizer(config)
        check_column(config, load_documents(config, load_builder(config)))


def prepare(config: TrainConfig, keep_all: bool = False) -> Path:
    """Tokenise the dataset into rows, or find the rows of an earlier run.

    Runs in the driver, before any worker exists. When several processes call it at
    once, one works and the others wait. With ``keep_all`` no token is dropped: the last
    row of packed documents is padded, and long documents get as many rows as they need.
    Rows that exist are read once and compared with their checksums; damaged ones are
    made again.

    Returns:
        A folder with ``input_ids.npy`` (rows, seq_length) int32, ``lengths.npy``
        (rows,) int32, the number of real tokens in each row, and their checksums.

    Raises:
        ConfigError: the dataset cannot be read, lacks the column, or yields no row;
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
    builder = load_builder(config)
    directory = config.data_dir / fingerprint(config, tokenizer, builder, keep_all)
    make_folder(config.data_dir)
    with FileLock(f"{directory}.lock"):
        needed = vocabulary_of_found(directory)
        if needed is None:
            work = Path(tempfile.mkdtemp(dir=config.data_dir, prefix=".rows-"))
            try:
                write_rows(config, tokenizer, builder, work, keep_all)
                os.chmod(work, 0o755)  # mkdtemp makes it private
                needed = checks.write_checksums(work)
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
        print(f"{directory} is deleted and made again, because {error}", flush=True)
        shutil.rmtree(directory)
        return None


def check_prepared(config: TrainConfig) -> Path:
    """The folder of rows that the config names; its rows must have the right length."""
    directory = Path(config.prepared_data)
    try:
        _, length = checks.open_rows(directory)[0].shape
    except checks.DamageError as error:
        raise not_rows(config, error) from error
    if length != config.seq_length:
        raise ConfigError(
            f"prepared_data={config.prepared_data!r} must hold rows of "
            f"seq_length={config.seq_length}, but they have {length} tokens; "
            f"try seq_length={length}"
        )
    return directory


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


def fingerprint(config: TrainConfig, tokenizer, builder, keep_all: bool) -> str:
    """Name of the rows: equal for equal content, different after any change."""
    parts = {
        "tokenizer": tokenizer.backend_tokenizer.to_str(),
        "end": tokenizer.eos_token_id,
        "dataset": [builder.dataset_name, builder.config_id, builder.hash],
        "split": config.dataset_split,
        "percentage": config.dataset_percentage,
        "text_column": config.text_column,
        "seq_length": config.seq_length,
        "pack": config.pack,
        "whole": keep_all,  # key kept: it is part of the names of rows on disk
    }
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:16]


def write_rows(
    config: TrainConfig, tokenizer, builder, directory: Path, keep_all: bool
) -> None:
    documents = tokenize(config, tokenizer, builder, directory / "tokens.arrow")
    lengths = np.concatenate(
        [batch["length"].to_numpy() for batch in arrow_batches(documents)]
        or [np.zeros(0, int)]
    )
    if config.pack:
        lengths = lengths.sum(keepdims=True)
    row_lengths = split(lengths, config.seq_length, config.pack, keep_all)
    if len(row_lengths) == 0:
        raise ConfigError(
            f"dataset_percentage={config.dataset_percentage:g} of "
            f"{config.dataset_name!r} must fill at least one row of "
            f"seq_length={config.seq_length}, but holds {int(lengths.sum())} tokens; "
            "try dataset_percentage=100 or a shorter seq_length"
        )
    np.save(directory / "lengths.npy", row_lengths)
    shape = (len(row_lengths), config.seq_length)
    rows = np.lib.format.open_memmap(directory / "input_ids.npy", "w+", np.int32, shape)
    unfilled = rows[-1:] if config.pack else rows  # where padding may be needed
    pad = tokenizer.pad_token_id
    unfilled[:] = tokenizer.eos_token_id if pad is None else pad
    fill = fill_packed if config.pack else fill_padded
    fill(rows, documents, keep_all)
    rows.flush()
    for leftover in directory.glob("tokens*.arrow"):  # one from each process
        leftover.unlink()


def split(lengths: np.ndarray, size: int, pack: bool, keep_all: bool) -> np.ndarray:
    """Lengths of the rows that texts of these lengths are split into, in order.

    A row of one token has nothing to predict and is never made.
    """
    rows = []
    for length in lengths.tolist():
        full, rest = divmod(length, size)
        if not keep_all:
            full, rest = (full, 0) if pack else (min(full, 1), rest * (full == 0))
        rows += [size] * full + [rest] * (rest > 1)
    return np.array(rows, np.int32)


def arrow_batches(documents):
    return documents.with_format("arrow").iter(batch_size=1000)


def fill_packed(rows: np.ndarray, documents, keep_all: bool) -> None:
    flat, start = rows.reshape(-1), 0
    for batch in arrow_batches(documents):
        tokens = batch["input_ids"].combine_chunks().flatten().to_numpy()
        tokens = tokens[: len(flat) - start]  # drop what fills no row
        flat[start : start + len(tokens)] = tokens
        start += len(tokens)


def fill_padded(rows: np.ndarray, documents, keep_all: bool) -> None:
    index, size = 0, rows.shape[1]
    for document in documents.select_columns("input_ids"):
        tokens = document["input_ids"]
        for start in range(0, len(tokens) if keep_all else 1, size):
            piece = tokens[start : start + size]
            if len(piece) > 1:
                rows[index, : len(piece)] = piece
                index += 1
