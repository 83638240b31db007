"""What Ray and the loop add to a step: the same one in processes, and in a run."""

from __future__ import annotations

import os
import time
from contextlib import redirect_stdout
from dataclasses import replace
from functools import partial
from importlib import import_module
from io import StringIO
from math import prod
from pathlib import Path
from statistics import median

import numpy as np

from scripts.benchmarks.harness import CORES, Table, alternate, processes
from scripts.benchmarks.sizes import (
    SIZES,
    autotp,
    config_at,
    fsdp,
    training,
    write_model,
)
from scripts.benchmarks.training import step_time

SIZE, STEPS = "26M", 8


def time_in_run(storage: str, engine: str, dp_size: int, tp_size: int) -> float:
    """Milliseconds per step of a run, but for the first two."""
    from tp2d_lib import checkpoint
    from tp2d_lib.run import launch

    _, rows, tokens = SIZES[SIZE]
    config = config_at(
        storage,
        SIZE,
        dp_size,
        tp_size,
        prepared_data=write_rows(f"{storage}/rows", rows * STEPS, tokens),
        run_name=f"{engine}-{time.time_ns()}",
        log_interval=2,
    )
    module = import_module(f"tp2d_lib.{engine}")
    config = replace(config, max_steps=STEPS)
    with redirect_stdout(StringIO()):
        result = launch.run(module.train_func, config, module.check)
    _, *later = checkpoint.history(result)
    return 1000 * median(record["step_time"] for record in later)


def write_rows(folder: str, rows: int, tokens: int) -> str:
    Path(folder).mkdir(exist_ok=True)
    ids = np.random.default_rng(0).integers(2000, size=(rows, tokens), dtype=np.int32)
    np.save(f"{folder}/input_ids.npy", ids)
    np.save(f"{folder}/lengths.npy", np.full(rows, tokens, np.int32))
    return folder


def compare_ray(rounds: int, storage: str) -> Table:
    """Ray: one step of the model of 26 million parameters in processes of one
    thread, and in a run that Ray started, with its loop, its log and its progress.
    Ray's own processes need a core that the ranks leave free.
    """
    os.environ["RAY_ADDRESS"] = "local"  # a cluster of our own
    import ray  # here: no other comparison needs it

    write_model(storage, SIZE)
    with processes(1, threads=1) as one, processes(4, threads=1) as four:
        measures = {}
        for ranks, mesh in ((one, (1, 1)), (four, (2, 2))):
            for engine, build in (("fsdp", fsdp), ("autotp", autotp)):
                name = f"{engine}, {prod(mesh)} rank(s) on {CORES} cores"
                of = (training, storage, SIZE, build, *mesh)
                measures[f"{name}, processes"] = partial(step_time, ranks, *of)
                in_run = partial(time_in_run, storage, engine, *mesh)
                measures[f"{name}, run"] = in_run
        alternate(1, {name: measures[name] for name in measures if "run" not in name})
        try:
            return "ms per step", alternate(rounds, measures)
        finally:
            ray.shutdown()
