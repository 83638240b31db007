"""Memory of a process while it loads a model and trains."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial

from scripts.benchmarks import peers
from scripts.benchmarks.harness import CORES, Table, alternate, processes
from scripts.benchmarks.sizes import DEEPSPEED, PYTORCH, training, write_model
from tp2d_lib.run.metrics import resident_bytes

anonymous_memory = partial(resident_bytes, "RssAnon")


@contextmanager
def watched_memory() -> Iterator[Callable[[], int]]:
    """Yields a function: the highest growth so far, sampled every 2 ms."""
    start, done = anonymous_memory(), threading.Event()
    samples = [start]

    def watch() -> None:
        while not done.wait(0.002):
            samples.append(anonymous_memory())

    threading.Thread(target=watch).start()
    try:
        yield lambda: max(*samples, anonymous_memory()) - start
    finally:
        done.set()


def grow(storage: str, build: Callable, dp_size: int, tp_size: int) -> int:
    """Bytes by which a process grows while it loads the model and takes two steps."""
    for size in ("1M", "26M"):  # first a small one, so that no import is counted
        with watched_memory() as growth:
            step, batches = training(storage, size, build, dp_size, tp_size)
            for _, batch in zip(range(2), batches, strict=False):
                step(batch)
            most = growth()
    return most


def compare_peaks(rounds: int, storage: str) -> Table:
    """Peak memory: highest growth of any process's anonymous memory, from before it
    loads the model of 26 million parameters to the end of its second step; 4 rows of
    512 tokens, dp2 x tp2 mesh of 4 processes x 1 thread. At most 3 rounds.
    """

    def largest(build: Callable, dp_size: int, tp_size: int) -> float:
        # New processes each time: freed memory need not go back to the system.
        count = dp_size * tp_size
        with processes(count, threads=CORES // count or 1) as run:
            return max(run(grow, storage, build, dp_size, tp_size)) / 1e6

    for size in ("1M", "26M"):
        write_model(storage, size)
    measures = {"one process": partial(largest, peers.one_process, 1, 1)}
    for name, build in (PYTORCH | DEEPSPEED).items():
        measures[name] = partial(largest, build, 2, 2)
    return "MB", alternate(min(rounds, 3), measures)
