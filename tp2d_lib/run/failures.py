"""How a worker's failure reaches the user: which rank failed first, where, and why."""

from __future__ import annotations

import os
import re
import socket
import time
from collections.abc import Callable

from tp2d_lib.checkpoint import lease
from tp2d_lib.config import TrainConfig
from tp2d_lib.run import prints
from tp2d_lib.run.progress import WorkerProgress
from tp2d_lib.run.watchdog import Hang, beating

PERMANENT = (
    "CheckpointError",
    "ConfigError",
    "GatedRepoError",
    "ImportError",
    "LeaseLost",
    "ModuleNotFoundError",
    "NonFiniteError",
    "PlanError",
    "RepositoryNotFoundError",
)
# What Gloo and NCCL say to the ranks that remain.
LOST = re.compile(r"Connection (closed|reset) by peer|remote process (has )?exited")


class RankFailed(RuntimeError):
    """What a rank raised, in one line: when, on which host, what."""


def on_rank(
    train_func: Callable[[TrainConfig], None],
    config: TrainConfig,
    holder: str,
    secrets: dict[str, str],
) -> None:
    """Run on one worker; failures carry a time, so that the driver finds the first.

    Args:
        holder: of the lease under which this worker may write.
        secrets: environment variables that must not be in Ray's logs.
    """
    lease.holder = holder
    os.environ.update(secrets)
    driver = WorkerProgress(config.run_name)
    try:
        with beating(config), prints.shown(driver.notify):
            train_func(config)
    except Exception as error:
        host = socket.gethostname()
        raise RankFailed(f"{time.time():.3f} {host} {named(error)}") from error
    finally:
        driver.flush()


def first(error: Exception) -> str:
    """The rank that failed first; others often fail only because it is gone."""
    if isinstance(error, Hang):
        return f"hang: {error}"
    failures = []
    for rank, failure in getattr(error, "worker_failures", {}).items():
        if found := report_of(failure):
            when, host, what = found
            failures.append((float(when), f"rank {rank} on {host}: {what}"))
        else:  # it died before it could report, or a thread of Ray's failed
            failures.append((0.0, f"rank {rank}: {named(failure)}"))
    return min(failures)[1] if failures else named(error)


def named(error: Exception) -> str:
    """Its type and the first line of what it says, which may be nothing."""
    return f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0]}"


def report_of(failure: Exception) -> tuple[str, str, str] | None:
    """When a rank failed, on which host, and what it raised; None if it died."""
    text = f"{type(failure).__name__}: {failure}"  # it may be a RankFailed, or quote it
    found = re.findall(r"RankFailed: ([\d.]+) (\S+) (.*)", text)
    if not found:
        return None
    when, host, what = found[-1]
    if lost := LOST.search(what):
        what = f"{what[: lost.end()]}: another rank has died"
    return when, host, what


def raised(error: Exception) -> bool:
    """Whether every rank that failed raised an exception, so that no process died."""
    failed = getattr(error, "worker_failures", {}).values()
    reports = [report_of(failure) for failure in failed]
    return bool(reports) and all(r and not LOST.search(r[2]) for r in reports)


def is_permanent(error: Exception) -> bool:
    """Whether the first failure is of a kind that every attempt would meet again."""
    return any(f": {kind}: " in f": {first(error)}" for kind in PERMANENT)
