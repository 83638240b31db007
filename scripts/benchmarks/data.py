"""Data preparation: once per run, against once in every worker."""

from __future__ import annotations

import os
import tempfile
import time
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch.distributed as dist

from scripts.benchmarks.harness import Table, alternate, processes
from scripts.benchmarks.training import bench_config
from tp2d_lib import data
from tp2d_lib.config import TrainConfig
from tp2d_lib.data import demo


def prepare(config: TrainConfig, folder: str, workers: int, apart: bool) -> float:
    """Seconds that data.prepare took in this process, if it is one of the workers."""
    own = f"rank{dist.get_rank()}" if apart else "shared"
    config = replace(config, cache_dir=os.path.join(folder, own))
    dist.barrier()
    start = time.perf_counter()
    if dist.get_rank() < workers:
        data.prepare(config)
    return time.perf_counter() - start


def compare_data(rounds: int, storage: str) -> Table:
    """4. Data preparation: data.prepare of ten times the demo corpus, into an empty
    cache; once per run, against once in every worker.
    """
    dataset = f"{storage}/long"
    demo.write_dataset(Path(dataset), train=demo.paragraphs() * 10)

    def seconds(workers: int = 1, apart: bool = False) -> float:
        config = bench_config(storage, dp_size=1, tp_size=1, dataset_name=dataset)
        with tempfile.TemporaryDirectory(dir=storage) as folder:
            return max(run(prepare, config, folder, workers, apart))

    with processes(4, threads=1) as run:
        seconds()  # the first reads and imports
        measures = {
            "once, 1 worker": seconds,
            "once, 4 workers: one works, 3 wait": partial(seconds, workers=4),
            "4 workers, each on its own": partial(seconds, workers=4, apart=True),
        }
        return "seconds", alternate(rounds, measures)
