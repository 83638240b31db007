"""Processes to measure in, alternating rounds, and tables of ratios."""

from __future__ import annotations

import multiprocessing
import os
import signal
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import ExitStack, contextmanager, suppress
from statistics import median

import torch
import torch.distributed as dist

# The unit, a list of values by row, and perhaps what theory says, over the first row.
Table = tuple[str, dict[str, list[float]]] | tuple[str, dict, list[float]]
AFFINITY = getattr(os, "sched_getaffinity", lambda _: range(os.cpu_count() or 1))
CORES = len(AFFINITY(0))


@contextmanager
def processes(count: int, threads: int) -> Iterator[Callable]:
    """A gloo group; yields `run(function, *args)`: the results, in rank order."""
    spawn = multiprocessing.get_context("spawn")
    with ExitStack() as stack:
        folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="tp2d-bench-"))
        ranks = []
        for rank in range(count):
            args = (rank, count, threads, f"{folder}/store")
            # One process each, so that every call reaches its own rank.
            ranks.append(stack.enter_context(ProcessPoolExecutor(1, spawn, join, args)))

        def run(function: Callable, *args) -> list:
            answers = [rank.submit(function, *args) for rank in ranks]
            for answer in as_completed(answers):
                answer.result()  # raises the first error; others may be waiting
            return [answer.result() for answer in answers]

        try:
            yield run
        except BaseException:
            for rank in ranks:  # whose end frees those that wait for it
                with suppress(BrokenProcessPool):
                    rank.submit(os._exit, 1)
            raise


def join(rank: int, world_size: int, threads: int, store: str) -> None:
    """The first thing each process does."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent
    torch.set_num_threads(threads)
    ranks = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world_size}
    os.environ.update({name: str(value) for name, value in ranks.items()})
    dist.init_process_group(
        "gloo", init_method=f"file://{store}", rank=rank, world_size=world_size
    )


def alternate(rounds: int, measures: dict[str, Callable]) -> dict[str, list]:
    """Every round takes each measurement once, the next round in reverse order."""
    values = {name: [] for name in measures}
    for index in range(rounds):
        for name in list(measures)[:: -1 if index % 2 else 1]:
            values[name].append(measures[name]())
    return values


def report(
    text: str,
    unit: str,
    values: dict[str, list[float]],
    theory: list[float] | None = None,
) -> dict[str, list[float]]:
    """Print a table; returns its rows, but for the first one, divided by that one."""
    first, width = next(iter(values)), max(map(len, values))
    relative = {}
    last = "" if theory is None else f"{'in theory':>12}"
    print(f"\n{text}\n\n    {'':{width}}{unit:>24}{'x the first row':>20}{last}")
    for index, (name, row) in enumerate(values.items()):
        ratios = [a / b for a, b in zip(row, values[first], strict=True)]
        shown = "1" if name == first else spread(ratios)
        last = "" if theory is None else f"{theory[index]:>12.2f}"
        print(f"    {name:{width}}{spread(row):>24}{shown:>20}{last}", flush=True)
        if name != first:
            relative[name] = ratios
    return relative


def spread(row: list[float]) -> str:
    digits = 0 if median(row) >= 100 else 1 if median(row) >= 10 else 2
    middle, low, high = (f"{f(row):,.{digits}f}" for f in (median, min, max))
    return f"{middle} ({low}-{high})"
