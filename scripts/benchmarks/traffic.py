"""What a rank sends in a step of each way."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from scripts.benchmarks.harness import Table, alternate, processes
from scripts.benchmarks.sizes import DEEPSPEED, PYTORCH, training, write_model
from tp2d_lib.cost.comm import CommBytes
from tp2d_lib.mesh import build_mesh


def sent(storage: str, build: Callable) -> float:
    """Megabytes that this rank sends in its third step, in rings."""
    step, batches = training(storage, "26M", build, 2, 2)
    for _ in range(2):
        step(next(batches))
    with CommBytes(build_mesh(2, 2), step.model) as counted:
        step(next(batches))
    return sum(count for _, count in counted.rows.values()) / 1e6


def compare_traffic(rounds: int, storage: str) -> Table:
    """Traffic: what a rank sends in a step of the model of 26 million parameters, 4
    rows of 512 tokens, dp2 x tp2 mesh, by the sizes of the tensors. It does not vary.
    """
    write_model(storage, "26M")

    def largest(build: Callable) -> float:
        with processes(4, threads=1) as ranks:
            return max(ranks(sent, storage, build))

    ways = PYTORCH | DEEPSPEED
    return "MB", alternate(1, {name: partial(largest, ways[name]) for name in ways})
