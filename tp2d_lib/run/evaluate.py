"""The validation loss: every held-out token once, the same number on every mesh."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist

from tp2d_lib import data
from tp2d_lib.config import ConfigError, TrainConfig


def check(config: TrainConfig) -> str | None:
    """``data.check`` for the held-out data, if any is evaluated.

    Raises:
        ConfigError: the held-out data cannot be read, or has no such split.
    """
    if not config.eval_every:
        return None
    with held_out(config) as other:
        return data.check(other)


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
    settings = {"prepared_data": config.prepared_eval_data}
    if not config.eval_fraction:
        settings |= {"dataset_split": config.eval_split, "dataset_percentage": 100}
    if config.eval_dataset:
        settings |= {"dataset_name": config.eval_dataset}
        settings |= {"dataset_config": None, "dataset_revision": None}
    try:
        yield replace(config, **settings)
    except ConfigError as error:
        sentence = re.sub(
            r"^dataset_split=(.*); try '.*'$",
            r"eval_split=\1; try eval_fraction=0.01, which holds out one in a hundred",
            str(error),
        )
        sentence = sentence.replace("prepared_data=", "prepared_eval_data=")
        if config.eval_dataset:
            sentence = sentence.replace("dataset_name=", "eval_dataset=")
        raise ConfigError(sentence) from error


def batches(config: TrainConfig, dp_rank: int) -> Iterator[dict[str, torch.Tensor]]:
    """This dp rank's micro-batches, as many as every other dp rank has.

    Rows are assigned in order; a row past the last one is all padding.
    """
    rows = data.open_rows(Path(config.prepared_eval_data))
    size = config.batch_size_per_gpu
    for start in range(0, len(rows.lengths), config.dp_size * size):
        yield data.micro_batch(rows, start + dp_rank * size + np.arange(size))


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
