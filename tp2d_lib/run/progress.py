"""Between driver and workers: progress goes one way, stop requests the other."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from tp2d_lib.config import ConfigError, TrainConfig
from tp2d_lib.run import display, watchdog

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


class Watcher:
    """Shows a run's progress and ends an attempt that hangs, while the driver waits."""

    def __init__(self, config: TrainConfig):
        here = ray.get_runtime_context().get_node_id()  # other nodes may be lost
        actor = ray.remote(num_cpus=0)(ProgressActor).options(
            name=watchdog.actor_name(config.run_name),
            scheduling_strategy=NodeAffinitySchedulingStrategy(here, soft=False),
            max_restarts=-1,  # if it dies, lines of progress are lost, but no training
            max_task_retries=-1,
        )
        self.actor = actor.remote()
        self.display = display.here()
        self.show = self.display.show
        self.total = 0
        self.start: str | None = None  # the checkpoint that the workers restored
        self.training = False  # whether the workers do; until then there is no step
        self.began: float | None = None  # when workers that are silent were asked for
        self.config, self.watchdog = config, watchdog.Watchdog(config.hang_timeout)
        self.ended: Exception | None = None
        self.placed = False  # whether all ranks were seen, and where they are
        self.guarding = threading.Lock()
        self.done = threading.Event()
        self.thread = threading.Thread(target=self.watch, daemon=True)

    def __enter__(self) -> Watcher:
        self.thread.start()  # Ray knows the actor by its name before it has started
        return self

    def __exit__(self, *_) -> None:
        self.done.set()
        self.thread.join()
        self.poll()
        self.display.end()
        ray.kill(self.actor)

    def stop_training(self, signal: str) -> None:
        """Make the workers save a checkpoint and return; say so at once.

        Raises:
            KeyboardInterrupt: they do not train yet, so there is nothing to save.
        """
        if not self.training:
            raise KeyboardInterrupt(f"{signal} before the workers trained")
        last = ray.get(self.actor.stop.remote())
        self.show(
            f"{signal}: finishing step {last}, then saving; press Ctrl-C again to stop "
            "now, unsaved",
            done=True,
        )

    def end_attempt(self, why: Exception) -> None:
        """Kill the workers, now or when they first answer; nothing more is saved."""
        self.ended = why

    def why_ended(self) -> Exception | None:
        """Why this driver ended the attempt, if it did."""
        with self.guarding:
            return self.ended

    def begin_attempt(self) -> None:
        with self.guarding:
            self.placed = self.training = False
            self.began = None
            ray.get(self.actor.begin_attempt.remote())
            self.watchdog.begin_attempt()
            if isinstance(self.ended, watchdog.Hang):
                self.ended = None

    def await_workers(self) -> None:
        """From now until a rank speaks, show how long they take to start."""
        self.began = time.monotonic()

    def guard(self) -> None:
        """Find a hang, have the ranks that answer write traces, kill all."""
        beats = ray.get(self.actor.last_beats.remote())
        self.check_tp_groups(beats)
        what = self.watchdog.judge(beats, time.monotonic())
        if what and not self.ended:
            self.actor.dump.remote()
            time.sleep(watchdog.DUMP_S)
            self.ended = watchdog.Hang(what + watchdog.traces(self.config))
        if self.ended:
            self.watchdog.kill(beats)

    def check_tp_groups(self, beats: dict[int, dict]) -> None:
        """Find TP groups that span nodes, from where the ranks really are; once.

        The placement asked for may not be what Ray gave.
        """
        from tp2d_lib.mesh import layout  # here: needs torch, the actor does not

        config = self.config
        if self.placed or len(beats) < config.num_workers:
            return
        self.placed = True
        for group in layout(config.dp_size, config.tp_size).tolist():
            nodes = {beats[rank]["node"]: beats[rank]["host"] for rank in group}
            if len(nodes) == 1 or config.tp_across_nodes == "allow":
                continue
            found = (
                f"ranks {', '.join(map(str, group))} are a TP group on {len(nodes)} "
                f"nodes, {', '.join(sorted(nodes.values()))}"
            )
            if config.tp_across_nodes == "refuse":
                self.ended = ConfigError(
                    f"tp_size={config.tp_size} must fit into one node, but {found}; "
                    "try a smaller tp_size, or tp_across_nodes='warn'"
                )
            else:
                self.show(f"{found}: every layer waits for the network", done=True)

    def furthest_step(self) -> int:
        """The furthest step that any attempt of this run has begun."""
        return ray.get(self.actor.furthest_step.remote())

    def was_preempted(self) -> str:
        """Why this attempt saved and ended early, if it was to make place; else ""."""
        return ray.get(self.actor.why_preempted.remote())

    def widen(self) -> None:
        ray.get(self.actor.widen.remote())

    def watch(self) -> None:
        while not self.done.wait(0.5):
            self.poll()
            if (began := self.began) and self.display.live:
                self.show(f"starting {self.took('...', began)}")
            with self.guarding:
                self.guard()

    def took(self, word: str, began: float) -> str:
        """So many workers, and the time since they were asked for."""
        seconds = time.monotonic() - began
        return f"{self.config.num_workers} workers {word} {seconds:.0f} s"

    def poll(self) -> None:
        for record in ray.get(self.actor.take.remote()):
            if began := self.began:
                self.show(f"started {self.took('in', began)}", done=True)
                self.began = None
            if "notice" in record:
                self.show(record["notice"], done=True)
            elif "total" in record:
                self.total, self.training = record["total"], True
                self.start, step = record["restored"], record["start"]
                if step == self.total:
                    text = f"nothing left to train after step {step} of {self.start}"
                    self.show(text, done=True)
                elif step:
                    self.show(f"resumed after step {step}", done=True)
            elif "eval_loss" in record:
                text = f"step {record['step']}: eval_loss {record['eval_loss']:.4f}"
                self.show(text, done=True)
            else:
                self.show(
                    display.line(record, self.total), record["step"] == self.total
                )
