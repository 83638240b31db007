"""Rows of tokens: tokenised once per run, then read by dp rank in a resumable order."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from filelock import FileLock

from tp2d_lib.config import ConfigError, TrainConfig
from tp2d_lib.dataset import load_builder, load_tokenizer, tokenize

IGNORED = -100  # label of a position that does not count, as in torch and transformers


def prepare(config: TrainConfig, whole: bool = False) -> Path:
    """Tokenise and cut the dataset into rows, or find the rows of an earlier run.

    Runs in the driver, before any worker exists. When several processes ask at once,
    one works and the others wait. With ``whole`` no token is left out: the last row
    of packed documents is padded, long documents get as many rows as they need.

    Returns:
        A folder with ``input_ids.npy`` (rows, seq_length) int32 and ``lengths.npy``
        (rows,) int32, the number of real tokens in each row.

    Raises:
        ConfigError: the dataset cannot be read, has no such column, or gives no row.
    """
    if config.prepared_data:
        return check_prepared(config)
    tokenizer = load_tokenizer(config)
    builder = load_builder(config)
    directory = config.data_dir / fingerprint(config, tokenizer, builder, whole)
    make_folder(config.data_dir)
    with FileLock(f"{directory}.lock"):
        if not directory.exists():
            work = Path(tempfile.mkdtemp(dir=config.data_dir, prefix=".rows-"))
            try:
                write_rows(config, tokenizer, builder, work, whole)
                os.chmod(work, 0o755)  # mkdtemp makes it private
                os.rename(work, directory)  # whole or not at all
            finally:
                shutil.rmtree(work, ignore_errors=True)
    return directory


def check_prepared(config: TrainConfig) -> Path:
    """The folder of rows the config names, if it holds rows of the right length."""
    directory = Path(config.prepared_data)
    try:
        length = np.load(directory / "input_ids.npy", mmap_mode="r").shape[1]
    except OSError as error:
        raise ConfigError(
            f"prepared_data={config.prepared_data!r} must be a folder written by "
            "data.prepare; try leaving it out"
        ) from error
    if length != config.seq_length:
        raise ConfigError(
            f"prepared_data={config.prepared_data!r} must hold rows of "
            f"seq_length={config.seq_length}, but they have {length} tokens; "
            f"try seq_length={length}"
        )
    return directory


def make_folder(directory: Path) -> None:
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(
            f"cache_dir={str(directory)!r} must be a folder that can be written "
            f"({error.strerror}); try cache_dir='/tmp/tp2d-data' on a single machine"
        ) from error


def fingerprint(config: TrainConfig, tokenizer, builder, whole: bool) -> str:
    """Name of the rows: the same for equal content, another for any change."""
    parts = {
        "tokenizer": tokenizer.backend_tokenizer.to_str(),
        "end": tokenizer.eos_token_id,
        "dataset": [builder.dataset_name, builder.config_id, builder.hash],
        "split": config.dataset_split,
        "percentage": config.dataset_percentage,
        "text_column": config.text_column,
        "seq_length": config.seq_length,
        "pack": config.pack,
        "whole": whole,
    }
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:16]


def write_rows(
    config: TrainConfig, tokenizer, builder, directory: Path, whole: bool
) -> None:
    documents = tokenize(config, tokenizer, builder, directory / "tokens.arrow")
    lengths = np.concatenate(
        [batch["length"].to_numpy() for batch in arrow_batches(documents)]
        or [np.zeros(0, int)]
    )
    if config.pack:
        lengths = lengths.sum(keepdims=True)
    row_lengths = cut(lengths, config.seq_length, only_full=config.pack, whole=whole)
    if len(row_lengths) == 0:
        raise ConfigError(
            f"dataset_percentage={config.dataset_percentage:g} of "
            f"{config.dataset_name!r} must fill at least one row of "
            f"seq_length={config.seq_length} but holds {int(lengths.sum())} tokens; "
            "try dataset_percentage=100 or a shorter seq_length"
        )
    np.save(directory / "lengths.npy", row_lengths)
    shape = (len(row_lengths), config.seq_length)
    rows = np.lib.format.open_memmap(directory / "input_ids.npy", "w+", np.int32, shape)
    unfilled = rows[-1:] if config.pack else rows  # what documents may leave of rows
    pad = tokenizer.pad_token_id
    unfilled[:] = tokenizer.eos_token_id if pad is None else pad
    fill = fill_packed if config.pack else fill_padded
    fill(rows, documents, whole)
    rows.flush()
    for leftover in directory.glob("tokens*.arrow"):  # one a process that tokenised
        leftover.unlink()


def cut(lengths: np.ndarray, size: int, only_full: bool, whole: bool) -> np.ndarray:
    """Lengths of the rows that texts of these lengths are cut into, in their order.

    A row of one token has nothing to predict and is never made.
    """
    rows = []
    for length in lengths.tolist():
        full, rest = divmod(length, size)
        if not whole:
            full, rest = (full, 0) if only_full else (min(full, 1), rest * (full == 0))
        rows += [size] * full + [rest] * (rest > 1)
    return np.array(rows, np.int32)


def arrow_batches(documents):
    return documents.with_format("arrow").iter(batch_size=1000)


def fill_packed(rows: np.ndarray, documents, whole: bool) -> None:
    flat, start = rows.reshape(-1), 0
    for batch in arrow_batches(documents):
        tokens = batch["input_ids"].combine_chunks().flatten().to_numpy()
        tokens = tokens[: len(flat) - start]  # what fills no row is left out
        flat[start : start + len(tokens)] = tokens
        start += len(tokens)


def fill_padded(rows: np.ndarray, documents, whole: bool) -> None:
    index, size = 0, rows.shape[1]
    for document in documents.select_columns("input_ids"):
        tokens = document["input_ids"]
        for start in range(0, len(tokens) if whole else 1, size):
            piece = tokens[start : start + size]
            if len(piece) > 1:
                rows[index, : len(piece)] = piece
                index += 1


class BatchLoader:
    """The batches of one dp rank, a list of micro-batches for every optimizer step.

    All epochs form one stream of samples whose order depends on ``(seed, epoch)`` only.
    A step takes the next ``global_batch_size`` samples of the stream; each dp rank gets
    its share. ``position``, the number of samples taken so far, is all there is to
    save: the same position means the same next samples on every mesh.
    """

    def __init__(self, config: TrainConfig, directory: Path, dp_rank: int):
        self.rows = np.load(directory / "input_ids.npy", mmap_mode="r")
        self.lengths = np.load(directory / "lengths.npy")
        self.config = config
        self.dp_rank = dp_rank
        self.position = 0
        samples = config.num_epochs * len(self.rows)
        if config.max_steps is not None:
            samples = min(samples, config.max_steps * config.global_batch_size)
        self.total_samples = samples
        if self.steps_left == 0:
            raise ConfigError(
                f"num_epochs={config.num_epochs} of {len(self.rows)} rows must fill "
                f"one global batch of {config.global_batch_size} rows; try "
                f"num_epochs={-(-config.global_batch_size // len(self.rows))}"
            )

    @property
    def steps_left(self) -> int:
        """Whole optimizer steps from here to the end of the stream."""
        left = max(self.total_samples - self.position, 0)
        return left // self.config.global_batch_size

    def sample_ids(self, start: int, count: int) -> np.ndarray:
        """Row numbers of samples ``start .. start + count`` of the stream."""
        size, ids = len(self.rows), []
        for epoch in range(start // size, (start + count - 1) // size + 1):
            order = epoch_order(size, self.config.seed, epoch)
            first = max(start - epoch * size, 0)
            ids.append(order[first : start + count - epoch * size])
        return np.concatenate(ids)

    def __iter__(self) -> Iterator[list[dict[str, torch.Tensor]]]:
        config = self.config
        while self.steps_left:
            ids = self.sample_ids(self.position, config.global_batch_size)
            self.position += len(ids)
            shares = ids.reshape(
                config.gradient_accumulation_steps,
                config.dp_size,
                config.batch_size_per_gpu,
            )
            yield [self.micro_batch(share) for share in shares[:, self.dp_rank]]

    def micro_batch(self, ids: np.ndarray) -> dict[str, torch.Tensor]:
        return micro_batch(self.rows[ids], self.lengths[ids])


def micro_batch(rows: np.ndarray, lengths: np.ndarray) -> dict[str, torch.Tensor]:
    """``input_ids`` and ``labels``, each (batch, seq) int64; padding is -100."""
    input_ids = torch.from_numpy(rows.astype(np.int64))
    padding = torch.arange(rows.shape[1]) >= torch.from_numpy(lengths).unsqueeze(1)
    return {"input_ids": input_ids, "labels": input_ids.masked_fill(padding, IGNORED)}


@lru_cache(maxsize=2)
def epoch_order(size: int, seed: int, epoch: int) -> np.ndarray:
    """A permutation of ``size`` rows that depends on (seed, epoch) alone."""
    return np.random.default_rng([seed, epoch]).permutation(size)


def build_dataloader(config: TrainConfig, mesh) -> BatchLoader:
    """The loader of this rank: rows follow ``dp_rank``, so a TP group reads the same.

    Args:
        config: ``prepared_data`` names the rows; left out, they are prepared here.
        mesh: the (dp, tp) mesh.
    """
    return BatchLoader(config, prepare(config), mesh["dp"].get_local_rank())


def valid_tokens(batch: list[dict[str, torch.Tensor]]) -> torch.Tensor:
    """Number of predicted tokens in a list of micro-batches, as a 0-d int64 tensor.

    Position t predicts token t + 1, so the first label of a row predicts nothing.
    """
    return sum((micro["labels"][:, 1:] != IGNORED).sum() for micro in batch)
