"""Batches of rows, by dp rank, in an order that a resumed run repeats exactly."""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch

from tp2d_lib.config import ConfigError, TrainConfig
from tp2d_lib.data.checks import Rows, open_rows
from tp2d_lib.data.rows import check_prepared, prepare
from tp2d_lib.model.attention import IGNORED


class BatchLoader:
    """The batches of one dp rank: a list of micro-batches for every optimizer step.

    All epochs form one stream of samples whose order depends on ``(seed, epoch)`` only.
    A step takes the next ``global_batch_size`` samples of the stream; each dp rank gets
    its share. ``position``, the number of samples taken so far, and ``step`` are the
    only state: from the same position, every mesh takes the same next samples.

    Raises:
        ConfigError: the rows do not fill one global batch.
    """

    def __init__(self, config: TrainConfig, directory: Path, dp_rank: int):
        self.rows = open_rows(directory)
        self.config = config
        self.dp_rank = dp_rank
        self.position = self.step = 0
        self.size = len(self.rows.lengths)
        self.total_samples = config.num_epochs * self.size
        if self.steps_left == 0:
            raise ConfigError(
                f"num_epochs={config.num_epochs} over {self.size} rows must fill "
                f"one global batch of {config.global_batch_size} rows; try "
                f"num_epochs={-(-config.global_batch_size // self.size)}"
            )

    @property
    def steps_left(self) -> int:
        """Complete optimizer steps from here to the end of the stream."""
        left = max(self.total_samples - self.position, 0)
        steps = left // self.config.global_batch_size
        if self.config.max_steps is None:
            return steps
        return max(min(steps, self.config.max_steps - self.step), 0)

    def sample_ids(self, start: int, count: int) -> np.ndarray:
        """Row numbers of samples ``start .. start + count`` of the stream."""
        size, ids = self.size, []
        for epoch in range(start // size, (start + count - 1) // size + 1):
            order = epoch_order(size, self.config.seed, epoch)
            first = max(start - epoch * size, 0)
            ids.append(order[first : start + count - epoch * size])
        return np.concatenate(ids)

    def tokens_in(self, start: int, count: int) -> int:
        """The tokens of samples ``start .. start + count``, without padding."""
        return int(self.rows.lengths[self.sample_ids(start, count)].sum())

    def __iter__(self) -> Iterator[list[dict[str, torch.Tensor]]]:
        while self.steps_left:
            shares = self.share_at(self.position)
            self.position += self.config.global_batch_size
            self.step += 1
            yield [self.micro_batch(share) for share in shares]

    def share_at(self, position: int) -> np.ndarray:
        """This dp rank's row numbers of the step that begins at a position.

        One line per micro-batch: (gradient_accumulation_steps, batch_size_per_gpu).
        """
        config = self.config
        ids = self.sample_ids(position, config.global_batch_size)
        shape = (config.dp_size, config.batch_size_per_gpu)
        return ids.reshape(-1, *shape)[:, self.dp_rank]

    def micro_batch(self, ids: np.ndarray) -> dict[str, torch.Tensor]:
        return micro_batch(self.rows, ids)


def micro_batch(rows: Rows, ids: np.ndarray) -> dict[str, torch.Tensor]:
    """Some rows as ``input_ids`` and ``labels``, each (batch, seq) int64.

    The label is -100 where nothing is to be predicted: in padding, which is all that a
    row past the last one holds, and in what is not trained on. Where no document may
    look into another there are ``position_ids``, which begin again with each document;
    the first token of one is predicted by nothing.
    """
    last = len(rows.lengths) - 1
    mine = np.minimum(ids, last)
    input_ids = rows.input_ids[mine].astype(np.int64)
    positions = np.arange(input_ids.shape[1])
    counts = positions < np.where(ids > last, 0, rows.lengths[mine])[:, None]
    if rows.loss_mask is not None:
        counts &= rows.loss_mask[mine]
    batch = {}
    if rows.starts is not None:
        starts = rows.starts[mine]
        counts &= ~starts
        first = np.maximum.accumulate(positions * starts, axis=1)
        batch["position_ids"] = torch.from_numpy(positions - first)
    batch["input_ids"] = torch.from_numpy(input_ids)
    labels = batch["input_ids"].masked_fill(~torch.from_numpy(counts), IGNORED)
    return batch | {"labels": labels}


@lru_cache(maxsize=2)
def epoch_order(size: int, seed: int, epoch: int) -> np.ndarray:
    """A permutation of ``size`` rows that depends on (seed, epoch) alone."""
    return np.random.default_rng([seed, epoch]).permutation(size)


def build_dataloader(config: TrainConfig, mesh) -> BatchLoader:
    """The loader of this rank; all ranks of a TP group read the same rows.

    Args:
        config: ``prepared_data`` names the rows; if None, they are prepared here.
        mesh: the (dp, tp) mesh.
    """
    # What the driver prepared, it also compared with its checksums.
    find = check_prepared if config.prepared_data else prepare
    return BatchLoader(config, find(config), mesh["dp"].get_local_rank())


def valid_tokens(batch: list[dict[str, torch.Tensor]]) -> torch.Tensor:
    """Number of predicted tokens in a list of micro-batches, as a 0-d int64 tensor.

    Position t predicts token t + 1, so nothing predicts the first label of a row.
    """
    return sum((micro["labels"][:, 1:] != IGNORED).sum() for micro in batch)
