"""Between driver and workers: progress goes one way, stop requests the other."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

import ray

from tp2d_lib.run import watchdog

PREEMPTION_S = 5.0  # between looks for a node that is about to be taken away


class ProgressActor:
    """Records of one run, in order of arrival, and the step after which to stop."""

    def __init__(self):
        self.records: list[dict] = []
        self.last_begun = self.furthest = self.total = 0
        # Step -> seconds on this process's clock, and how many ranks have asked.
        self.begun: dict[int, tuple[float, int]] = {}
        self.stop_after: int | None = None
        self.beats: dict[int, dict] = {}  # rank -> its last sign of life
        self.gone: set[tuple] = set()  # processes of earlier attempts
        self.dumping = False
        self.preempted = ""  # why the workers shall save and begin again, if so

    def add(self, record: dict) -> None:
        self.records.append(record)
        self.total = record.get("total", self.total)

    def take(self) -> list[dict]:
        """The records that have arrived since the last call."""
        taken, self.records = self.records, []
        return taken

    def stop(self) -> int:
        """Stop after the first step that no rank has begun yet; returns it."""
        self.stop_after = self.stop_after or self.last_begun + 1
        return self.stop_after

    def begin_attempt(self) -> None:
        """The workers begin again, at an earlier step than the last one begun."""
        self.last_begun, self.begun = 0, {}
        if self.preempted:  # else it was the user who stops the run
            self.stop_after = None
        self.dumping, self.preempted = False, ""
        self.gone |= {(beat["host"], beat["pid"]) for beat in self.beats.values()}
        self.beats = {}

    def beat(self, rank: int, beat: dict) -> bool:
        """Keep a rank's sign of life; returns whether it shall write a trace."""
        if (beat["host"], beat["pid"]) not in self.gone:  # else it was on its way
            self.beats[rank] = beat
        return self.dumping

    def last_beats(self) -> dict[int, dict]:
        return self.beats

    def dump(self) -> None:
        """Have every rank that still answers write a trace of its collectives."""
        self.dumping = True

    def furthest_step(self) -> int:
        return self.furthest

    def begin(self, step: int, ranks: int) -> tuple[bool, float]:
        """Whether to stop after the step now beginning, and the time of its beginning.

        Every rank gets the same answer, so they also agree on what is due by time. One
        may ask many steps before another, because a GPU's host does not wait for it.
        """
        self.last_begun = max(self.last_begun, step)
        self.furthest = max(self.furthest, step)
        now, asked = self.begun.get(step, (time.monotonic(), 0))
        self.begun[step] = now, asked + 1
        if asked + 1 == ranks:
            del self.begun[step]
        return self.stop_after is not None and step >= self.stop_after, now

    def preempt(self, why: str) -> None:
        """The workers save and return, because others shall take their place."""
        self.preempted = why

    def widen(self) -> None:
        """The same, after the first step that no rank has begun yet."""
        self.stop()
        self.preempt("there is room for more dp ranks")

    def why_preempted(self) -> str:
        return self.preempted if self.furthest < self.total else ""


class WorkerProgress:
    """A worker's end of the progress actor; does nothing when there is none."""

    def __init__(self, run_name: str | None):
        import torch.distributed as dist  # here: the actor does not need it

        self.publishes, self.ranks = dist.get_rank() == 0, dist.get_world_size()
        self.answer, self.now, self.looked = None, 0.0, 0.0
        self.sent = None
        self.stepped = False
        try:
            self.actor = ray.get_actor(watchdog.actor_name(run_name))
        except ValueError:  # no driver is watching
            self.actor = None

    def publish(self, record: dict) -> None:
        if self.actor and self.publishes:
            self.sent = self.actor.add.remote(record)

    def flush(self) -> None:
        """Wait until what was published has arrived, before this process may end."""
        if self.sent:
            ray.wait([self.sent], timeout=5)

    def notify(self, text: str) -> None:
        """Show a line of text to the user, once."""
        self.publish({"notice": text})

    def begin(self, step: int) -> None:
        """Ask early what ``should_stop`` will answer, because the reply takes time."""
        # The first one may compile, which takes long and is no hang.
        self.enter(watchdog.STEP if self.stepped else "first step", step)
        self.stepped = True
        if self.actor:
            self.answer = self.actor.begin.remote(step, self.ranks)

    def enter(self, phase: str, step: int) -> None:
        """Say what comes next; until the next ``begin`` no step is awaited."""
        if watchdog.heart:
            watchdog.heart.enter(phase, step)

    @contextmanager
    def during(self, phase: str) -> Iterator[None]:
        """Announce work within a step that may take far longer than a step."""
        before = watchdog.heart and (watchdog.heart.phase, watchdog.heart.step)
        if before:
            self.enter(phase, before[1])
        yield
        if before:
            self.enter(*before)

    def should_stop(self) -> bool:
        """Whether this step is the last; sets ``now``, the same on every rank."""
        if self.actor is None:
            return False
        stop, self.now = ray.get(self.answer)
        if self.now - self.looked < PREEMPTION_S:
            return stop
        self.looked = self.now
        return self.is_preempted() or stop

    def is_preempted(self) -> bool:
        """Whether Ray has been told that a worker's node ends; every rank must ask."""
        import ray.train  # here: slow, the actor does not need it

        # Ray 2.57 cannot tell; there, a lost node is a failure like any other.
        found = getattr(ray.train, "get_preemption_info", lambda: None)()
        if found and self.publishes:
            ranks = ", ".join(map(str, found.preempted_ranks))
            self.notify(f"preemption: ranks {ranks} will lose their node; saving")
            ray.get(self.actor.preempt.remote("preemption"))
        return found is not None
