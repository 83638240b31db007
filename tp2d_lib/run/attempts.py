"""Train until it is done: restart what can succeed, stop at what would fail again."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import Future, wait
from functools import partial

import ray
import ray.train
from ray.train.torch import TorchTrainer

from tp2d_lib.checkpoint import lease, manifest, storage
from tp2d_lib.config import TrainConfig
from tp2d_lib.run import failures
from tp2d_lib.run.watchdog import Hang
from tp2d_lib.run.watcher import Watcher
from tp2d_lib.validation import UserError

SNAPSHOT = "checkpoint_manager_snapshot.json"  # Ray's own list, which may be damaged
ROOM_S = 5.0  # between looks for room
FAILED = (
    ray.train.TrainingFailedError,
    ray.exceptions.RayError,
    Hang,
    lease.LeaseLost,
)


class Failed(UserError, RuntimeError):
    """Training failed for good; says which rank failed first, where, and why."""


class Stopped(UserError, RuntimeError):
    """A signal ended the run early."""


def fit(
    build_trainer: Callable[[], tuple[TorchTrainer, Callable[[], bool] | None]],
    config: TrainConfig,
    watcher: Watcher,
    caught: list[str],
) -> ray.train.Result:
    """Run attempts until one succeeds; each begins at the newest good checkpoint.

    An attempt is repeated, up to ``max_failures`` times, if it may end differently: a
    process died or hung, or steps were gained before an exception. Ray itself would
    repeat all. One that ended because a node is taken away, or because there is room
    for all dp ranks again, is no failure: it has saved.

    Args:
        build_trainer: for the next attempt; what it returns besides a trainer is asked
            whether there is room for more dp ranks.
        caught: the name of a signal, once one has been received; then nothing restarts.

    Raises:
        Failed: the last attempt did, or hung, or another process took over the run.
    """
    restarts, furthest, without_gain = 0, 0, 0
    while True:
        manifest.remove_leftovers(config, partial(watcher.show, done=True))
        storage.remove(config, SNAPSHOT)
        trainer, has_room = build_trainer()
        watcher.await_workers()
        attempt = outcome(trainer)
        while has_room and not wait([attempt], ROOM_S).done:
            if has_room():
                watcher.widen()
                break
        error = attempt.exception()
        preempted = "" if caught else watcher.was_preempted()
        if not isinstance(error, FAILED) and not preempted:
            return attempt.result()
        error = watcher.why_ended() or error
        reached = watcher.furthest_step()
        without_gain = 0 if reached > furthest else without_gain + 1
        furthest = max(furthest, reached)
        reason = failures.first(error) if error else preempted
        if not preempted:
            restarts += 1
            allowed = 0 if failures.raised(error) else 1
            if (
                restarts > config.max_failures
                or caught
                or failures.is_permanent(error)
                or without_gain > allowed
            ):
                raise Failed(reason) from error
        watcher.begin_attempt()
        count = f" {restarts} of {config.max_failures}" * (not preempted)
        watcher.show(f"restart{count}: {reason}", done=True)


def outcome(trainer: TorchTrainer) -> Future:
    """Fit in a thread: in the main one Ray handles Ctrl-C and abandons the run."""
    future: Future = Future()

    def run() -> None:
        try:
            future.set_result(trainer.fit())
        except BaseException as error:
            future.set_exception(error)

    threading.Thread(target=run, daemon=True).start()
    return future
