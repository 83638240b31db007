"""Hangs: ranks send signs of life; the driver ends an attempt that stands still."""

from __future__ import annotations

import math
import os
import signal
import socket
import sys
import threading
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from tp2d_lib.config import TrainConfig
from tp2d_lib.integrity import HashedFile

BEAT_S = 1.0
DUMP_S = 3.0  # for the ranks that answer to write their traces
LEAST_S = 120.0  # without a step, or without a word while stepping
PATIENT_S = 600.0  # without a word otherwise: a C call may hold Python's lock for long
TRACES = "traces_of_hang"  # folder in the run's folder
STEP = "step"  # the phase in which steps must follow each other
TOGETHER = {  # phases in which ranks wait for each other; seconds without a change
    "evaluate": PATIENT_S,
    "save": PATIENT_S,
    "earlier save": 3600.0,  # it is written in a thread, whose last call may be long
}


class Hang(RuntimeError):
    """A rank fell silent, or no rank finished a step; says which, where, since when."""


heart: Heart | None = None  # this worker's, while it trains


def actor_name(run_name: str | None) -> str:
    return f"tp2d-progress-{run_name}"


@contextmanager
def beating(config: TrainConfig) -> Iterator[None]:
    """Send signs of life while this worker trains, if a driver is watching."""
    global heart
    try:
        actor = ray.get_actor(actor_name(config.run_name))
    except ValueError:
        yield
        return
    heart = Heart(actor, config)
    heart.start()
    try:
        yield
    finally:
        heart.stop()


class Heart(threading.Thread):
    """A worker's sign of life: what it does, sent every second from a thread."""

    def __init__(self, actor, config: TrainConfig):
        import ray.train  # here, and below: slow, the progress actor does not need it

        from tp2d_lib.checkpoint.lease import started  # here: needs PyTorch

        super().__init__(daemon=True)
        self.actor, self.config = actor, config
        self.rank = ray.train.get_context().get_world_rank()
        self.trainer = threading.get_ident()
        self.done = threading.Event()
        self.step, self.phase, self.count = 0, "load", 0
        pid = os.getpid()
        self.about = {
            "host": socket.gethostname(),
            "node": ray.get_runtime_context().get_node_id(),
            "pid": pid,
            "started": started(pid),
        }

    def run(self) -> None:
        while not self.done.is_set():
            if ray.get(self.beat()):
                return self.dump()
            self.done.wait(BEAT_S)

    def beat(self) -> ray.ObjectRef:
        self.count += 1
        now = {"step": self.step, "phase": self.phase, "count": self.count}
        now |= {"where": where(self.trainer), "written": HashedFile.total}
        return self.actor.beat.remote(self.rank, {**self.about, **now})

    def enter(self, phase: str, step: int) -> None:
        """Say at once what begins: the rank may stop before the next second."""
        self.phase, self.step = phase, step
        self.beat()

    def dump(self) -> None:
        """Write which collectives this rank began and finished; it then is killed."""
        from torch._C import _distributed_c10d as c10d

        from tp2d_lib.checkpoint import storage

        # The former exists where NCCL does, the latter is Gloo's.
        trace = getattr(c10d, "_dump_nccl_trace", c10d._dump_fr_trace)
        storage.write(self.config, f"{TRACES}/rank_{self.rank}", trace())

    def stop(self) -> None:
        """Say, last of all, that nothing more is to be expected."""
        self.done.set()
        self.join(timeout=10)
        self.phase = "done"
        self.beat()


def traces(config: TrainConfig) -> str:
    """How to read the traces; PyTorch's tool knows only those of NCCL."""
    if config.device != "cuda":
        return ""
    folder = f"{config.storage_path}/{config.run_name}/{TRACES}"
    return (
        "; to see the last collectives of each rank that answered: "
        f"torchfrtrace {folder} -p rank_ --allow-incomplete-ranks"
    )


def where(thread: int) -> str:
    """The Python function that a thread is in."""
    frame = sys._current_frames()[thread]
    code = frame.f_code
    return f"{code.co_name} ({Path(code.co_filename).name}:{frame.f_lineno})"


class Watchdog:
    """Judges by what changes while it looks, because clocks of machines may differ.

    Args:
        timeout: seconds without a word or a step; if None, five times the slowest step
            seen, and at least two minutes.
    """

    def __init__(self, timeout: int | None):
        self.timeout, self.slowest = timeout, 0.0
        self.looked: float | None = None
        self.killed: set[tuple] = set()
        self.begin_attempt()

    def begin_attempt(self) -> None:
        self.heard: dict[int, tuple[int, float]] = {}  # rank -> last count, when
        self.steps: dict[int, int] = {}
        self.moved = 0.0
        # Rank -> step, phase, line of code, and bytes of checkpoints so far.
        self.places: dict[int, tuple] = {}
        self.left = 0.0

    def judge(self, beats: dict[int, dict], now: float) -> str | None:
        """What hangs, in one clause, or None; to be called every second or so."""
        limit = self.timeout or max(LEAST_S, 5 * self.slowest)
        if self.looked is not None and now - self.looked > limit / 2:
            self.begin_attempt()  # this process was suspended, and heard nobody
        self.looked = now
        beats = {rank: beat for rank, beat in beats.items() if beat["phase"] != "done"}
        stuck = self.standstill(beats, now, limit) or self.freeze(beats, now, limit)
        return self.silence(beats, now, 0 if stuck else limit) or stuck

    def silence(self, beats: dict, now: float, limit: float) -> str | None:
        silent = {}
        for rank, beat in beats.items():
            count, since = self.heard.get(rank, (0, now))
            if beat["count"] != count:
                since = now
            self.heard[rank] = beat["count"], since
            allowed = limit if beat["phase"] == STEP else max(limit, PATIENT_S)
            if now - since > max(allowed, 3 * BEAT_S):
                silent[rank] = now - since
        if not silent:
            return None
        rank = max(silent, key=silent.get)
        others = f", nor have {len(silent) - 1} other ranks" * (len(silent) > 1)
        step, phase = beats[rank]["step"], beats[rank]["phase"]
        return (
            f"rank {rank} on host {beats[rank]['host']} has said nothing since "
            f"{f'step {step}' if step else 'before its first step'}"
            f"{f', phase {phase!r}' * (phase != STEP)} ({silent[rank]:.0f} s){others}"
        )

    def standstill(self, beats: dict, now: float, limit: float) -> str | None:
        """The clock of steps runs only while every rank is between steps."""
        steps = {rank: beat["step"] for rank, beat in beats.items()}
        stepping = beats and all(beat["phase"] == STEP for beat in beats.values())
        if steps != self.steps or not stepping:
            if stepping and self.moved:
                self.slowest = max(self.slowest, now - self.moved)
            self.steps, self.moved = steps, now if stepping else 0.0
        if not stepping or now - self.moved <= limit:
            return None
        found = "; ".join(groups(beats))
        return f"no rank has finished a step for {now - self.moved:.0f} s: {found}"

    def freeze(self, beats: dict, now: float, limit: float) -> str | None:
        """Ranks that evaluate or save, answer, and yet wait for each other for ever."""
        keys = ("step", "phase", "where", "written")
        places = {r: tuple(map(beat.get, keys)) for r, beat in beats.items()}
        if places != self.places or not beats:
            self.places, self.left = places, now
        phases = {beat["phase"] for beat in beats.values()}
        allowed = [limit, *(TOGETHER.get(phase, math.inf) for phase in phases)]
        if now - self.left <= max(allowed):
            return None
        found = "; ".join(groups(beats))
        return f"no rank has left its line of code for {now - self.left:.0f} s: {found}"

    def kill(self, beats: dict[int, dict]) -> None:
        """End these workers, so that Ray Train sees the attempt fail; does not wait."""
        processes = defaultdict(list)
        for beat in beats.values():
            if (beat["host"], beat["pid"]) not in self.killed:
                self.killed.add((beat["host"], beat["pid"]))
                processes[beat["node"]].append((beat["pid"], beat["started"]))
        for node, found in processes.items():
            here = NodeAffinitySchedulingStrategy(node, soft=False)
            kill.options(scheduling_strategy=here).remote(found)


def groups(beats: dict[int, dict]) -> list[str]:
    """Which ranks are where: first those behind the others, or unlike most."""
    ranks = defaultdict(list)
    for rank, beat in sorted(beats.items()):
        ranks[beat["step"], beat["where"]].append(rank)
    order = sorted(ranks, key=lambda key: (key[0], len(ranks[key])))
    return [
        f"rank{'s' * (len(ranks[key]) > 1)} {', '.join(map(str, ranks[key][:8]))}"
        f"{', ...' * (len(ranks[key]) > 8)} on host {beats[ranks[key][0]]['host']} "
        f"at step {key[0]} in {key[1]}"
        for key in order[:3]
    ]


@ray.remote(num_cpus=0, max_retries=0)
def kill(processes: list[tuple[int, str | None]]) -> None:
    """End processes of this node; SIGKILL also ends one that was stopped."""
    from tp2d_lib.checkpoint.lease import started  # here: the actor needs no PyTorch

    for pid, since in processes:
        if started(pid) == since:  # else it is gone, or another one
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
