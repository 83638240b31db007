"""How long a checkpoint keeps training waiting."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable
from functools import cache, partial

import torch.distributed as dist

from scripts.benchmarks.harness import Table, alternate, processes
from scripts.benchmarks.training import bench_config
from tp2d_lib import data
from tp2d_lib.fsdp import build_engine
from tp2d_lib.mesh import build_mesh


@cache
def saving_engine(storage: str, in_threads: bool):
    """An engine after one step, so that it has an optimizer state to save."""
    config = bench_config(storage, 2, 2, async_checkpoint=in_threads)
    mesh = build_mesh(2, 2)
    engine = build_engine(config, mesh)
    engine.step(next(iter(data.build_dataloader(config, mesh))))
    return engine


def standstill(storage: str, in_threads: bool) -> float:
    """Milliseconds until training can continue; later writing is not counted."""
    engine = saving_engine(storage, in_threads)
    with tempfile.TemporaryDirectory(dir=storage) as folder:
        dist.barrier()
        start = time.perf_counter()
        written = engine.save(folder)
        seconds = time.perf_counter() - start
        if written:
            written.result()
    return seconds * 1000


def compare_checkpoints(rounds: int, storage: str) -> Table:
    """Checkpoints: how long training stands still while FSDP2 saves the demo model
    with its AdamW state, 13 MB in all; dp2 x tp2 mesh of 4 processes x 1 thread.
    """

    def slowest(run: Callable, in_threads: bool) -> float:
        return max(run(standstill, storage, in_threads))

    with processes(4, threads=1) as ranks:
        measures = {
            "synchronous": partial(slowest, ranks, False),
            "async_checkpoint": partial(slowest, ranks, True),
        }
        alternate(1, measures)
        return "ms", alternate(rounds, measures)
