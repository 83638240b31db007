"""A configuration to train by, rows, and the time of a step."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator

import torch
import torch.distributed as dist

from tp2d_lib import data
from tp2d_lib.config import TrainConfig
from tp2d_lib.presets import build_config

Training = tuple[Callable, Iterator]  # one step, and the batches it is given
ROWS = 8  # in a global batch
BURST = 5  # steps timed as one


def bench_config(storage: str, dp_size: int, tp_size: int, **settings) -> TrainConfig:
    """The demo with the same global batch on every mesh, and no end of data."""
    settings |= {"dp_size": dp_size, "tp_size": tp_size, "num_epochs": 1000}
    settings = {"batch_size_per_gpu": ROWS // dp_size} | settings
    return build_config("demo", storage, max_steps=10_000, **settings)


def same_rows(config: TrainConfig) -> Iterator[list[dict[str, torch.Tensor]]]:
    """The same random rows again and again, equal on all ranks."""
    shape = (config.batch_size_per_gpu, config.seq_length)
    ids = torch.randint(2000, shape, generator=torch.Generator())
    batch = [{"input_ids": ids, "labels": ids}]
    return iter(lambda: batch, None)


def burst(steps: int, build: Callable, *args) -> tuple[float, int]:
    """Seconds a few steps took in this process, and the real tokens in its rows."""
    step, batches = build(*args)
    dist.barrier()
    start, real = time.perf_counter(), 0
    for _ in range(steps):
        batch = next(batches)
        step(batch)
        real += sum(int((micro["labels"] != data.IGNORED).sum()) for micro in batch)
    return time.perf_counter() - start, real


def step_time(run: Callable, build: Callable, *args, steps: int = BURST) -> float:
    """Milliseconds per step, on the slowest rank."""
    times = run(burst, steps, build, *args)
    return max(seconds for seconds, _ in times) / steps * 1000
