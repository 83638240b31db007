"""How a worker's failure reaches the user: which rank failed first, where, and why."""

from __future__ import annotations

import re
import socket
import time
from collections.abc import Callable

from tp2d_lib.config import TrainConfig


class RankFailed(RuntimeError):
    """What a rank raised, in one line: when, on which host, what."""


def on_rank(train_func: Callable[[TrainConfig], None], config: TrainConfig) -> None:
    """Run on one worker; failures carry a time, so that the driver finds the first."""
    try:
        train_func(config)
    except Exception as error:
        sentence = (str(error).strip().splitlines() or [""])[0]
        host = socket.gethostname()
        raise RankFailed(
            f"{time.time():.3f} {host} {type(error).__name__}: {sentence}"
        ) from error


def first(error: Exception) -> str:
    """The rank that failed first; others often fail only because it is gone."""
    failures = []
    for rank, failure in getattr(error, "worker_failures", {}).items():
        found = re.findall(r"RankFailed: ([\d.]+) (\S+) (.*)", str(failure))
        if found:
            when, host, what = found[-1]
            failures.append((float(when), f"rank {rank} on {host}: {what}"))
        else:  # it died before it could report
            what = str(failure).strip().splitlines()[0]
            failures.append((0.0, f"rank {rank}: {type(failure).__name__}: {what}"))
    return min(failures)[1] if failures else str(error).strip()
