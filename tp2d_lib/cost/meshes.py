"""Which mesh? What a rank holds and sends on each one of so many ranks."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from tp2d_lib.config import ConfigError, TrainConfig
from tp2d_lib.cost import dryrun
from tp2d_lib.model import PlanError

TITLES = ("mesh", "rows in a step", "state", "peak", "over tp", "over dp")


def compare(
    engine: str, config: TrainConfig, check: Callable[[TrainConfig], TrainConfig]
) -> str:
    """A line for each mesh of ``config.num_workers`` ranks, as a table.

    "State" is the weights, gradients and optimizer state of a rank, "peak" the most
    that it holds at once, and the rest what it sends in a step. Each dp rank keeps its
    rows, so a step has fewer of them where tp is larger. How long a step takes is not
    predicted.

    Args:
        check: that of the engine; a mesh that it refuses has its reason instead.

    Raises:
        ConfigError, PlanError: the first, if all meshes are refused.
    """
    ranks = config.num_workers
    rows, refused = [TITLES], []
    for tp_size in (n for n in range(1, ranks + 1) if ranks % n == 0):
        mesh = f"tp {tp_size} x dp {ranks // tp_size}"
        try:
            one = check(replace(config, tp_size=tp_size, dp_size=ranks // tp_size))
        except (ConfigError, PlanError) as error:
            refused.append((f"{mesh}: {error}", error))
            continue
        predicted = dryrun.predict(engine, one)
        state = sum(predicted[name] for name in dryrun.HELD[:3])
        counts = (state, dryrun.peak(predicted), predicted["tp"], predicted["dp"])
        in_step = str(one.global_batch_size)
        rows.append((mesh, in_step, *map(dryrun.size, counts)))
    if len(rows) == 1:
        raise refused[0][1]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join(map(str.ljust, row, widths)).rstrip() for row in rows]
    return "\n".join([*lines, *(line for line, _ in refused)])
