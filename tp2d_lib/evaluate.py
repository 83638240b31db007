"""The validation loss: every held-out token once, the same number on every mesh."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist

from tp2d_lib import data
from tp2d_lib.config import ConfigError, TrainConfig


def check(config: TrainConfig) -> None:
    """Find, without tokenising, what would make ``prepare`` fail.

    Raises:
        ConfigError: the held-out data cannot be read, or has no such split.
    """
    if config.eval_every:
        with held_out(config) as other:
            data.check(other)


def prepare(config: TrainConfig) -> Path | None:
    """Prepare the rows of the held-out data without dropping tokens; driver only.

    Raises:
        ConfigError: as in ``check``.
    """
    if not config.eval_every:
        return None
    with held_out(config) as other:
        return data.prepare(other, keep_all=True)


@contextmanager
def held_out(config: TrainConfig) -> Iterator[TrainConfig]:
    """The configuration to read held-out data with; errors name the user's fields."""
    settings = {"dataset_split": config.eval_split, "dataset_percentage": 100}
    if config.eval_dataset:
        settings |= {"dataset_name": config.eval_dataset, "dataset_config": None}
    try:
        yield replace(config, **settings, prepared_data=config.prepared_eval_data)
    except ConfigError as error:
        sentence = str(error).replace("dataset_split=", "eval_split=")
        sentence = sentence.replace("prepared_data=", "prepared_eval_data=")
        if config.eval_dataset:
            sentence = sentence.replace("dataset_name=", "eval_dataset=")
        raise ConfigError(sentence) from error


def batches(config: TrainConfig, dp_rank: int) -> Iterator[dict[str, torch.Tensor]]:
    """This dp rank's micro-batches, as many as every other dp rank has.

    Rows are assigned in order; a row past the last one is all padding.
    """
    directory = Path(config.prepared_eval_data)
    rows = np.load(directory / "input_ids.npy", mmap_mode="r")
    lengths = np.load(directory / "lengths.npy")
    size = config.batch_size_per_gpu
    for start in range(0, len(rows), config.dp_size * size):
        ids = start + dp_rank * size + np.arange(size)
        mine = np.minimum(ids, len(rows) - 1)
        yield data.micro_batch(rows[mine], np.where(ids < len(rows), lengths[mine], 0))


def evaluate(engine, config: TrainConfig) -> float:
    """Mean loss of the held-out tokens in nats per token; every rank must call it.

    Nothing predicts the first token of a row, so it is not counted.
    """
    dp = engine.mesh["dp"]
    total = torch.zeros(2, dtype=torch.float64, device=engine.device)
    engine.model.eval()
    with torch.no_grad():
        for micro in batches(config, dp.get_local_rank()):
            total[0] += engine.summed_loss(micro)
            total[1] += data.valid_tokens([micro])
    engine.model.train()
    dist.all_reduce(total, group=dp.get_group())
    loss, tokens = total.tolist()
    return loss / tokens
