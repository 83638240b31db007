"""Between driver and workers: progress goes one way, stop requests the other."""

from __future__ import annotations

import shutil
import sys
import threading
import time
from collections.abc import Callable

import ray

from tp2d_lib.config import TrainConfig
from tp2d_lib.monitor import watchdog


class ProgressActor:
    """Records of one run, in order of arrival, and the step after which to stop."""

    def __init__(self):
        self.records: list[dict] = []
        self.last_begun = self.furthest = 0
        self.stop_after: int | None = None
        self.beats: dict[int, dict] = {}  # rank -> its last sign of life
        self.gone: set[tuple] = set()  # processes of earlier attempts
        self.dumping = False

    def add(self, record: dict) -> None:
        self.records.append(record)

    def since(self, count: int) -> list[dict]:
        return self.records[count:]

    def stop(self) -> int:
        """Stop after the first step that no rank has begun yet; returns it."""
        self.stop_after = self.stop_after or self.last_begun + 1
        return self.stop_after

    def begin_attempt(self) -> None:
        """The workers begin again, at an earlier step than the last one begun."""
        self.last_begun, self.dumping = 0, False
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

    def is_last(self, step: int) -> bool:
        """Whether to stop after the step now beginning; the same for every rank."""
        self.last_begun = max(self.last_begun, step)
        self.furthest = max(self.furthest, step)
        return self.stop_after is not None and step >= self.stop_after


class WorkerProgress:
    """A worker's end of the progress actor; does nothing when there is none."""

    def __init__(self, run_name: str | None):
        import torch.distributed as dist  # here: the actor does not need it

        self.publishes = dist.get_rank() == 0
        self.answer = None
        self.stepped = False
        try:
            self.actor = ray.get_actor(watchdog.actor_name(run_name))
        except ValueError:  # no driver is watching
            self.actor = None

    def publish(self, record: dict) -> None:
        if self.actor and self.publishes:
            self.actor.add.remote(record)

    def notify(self, text: str) -> None:
        """Show a line of text to the user, once."""
        self.publish({"notice": text})

    def begin(self, step: int) -> None:
        """Query early whether this step is the last, because the reply takes time."""
        # The first one may compile, which takes long and is no hang.
        self.enter(watchdog.STEP if self.stepped else "first step", step)
        self.stepped = True
        if self.actor:
            self.answer = self.actor.is_last.remote(step)

    def enter(self, phase: str, step: int) -> None:
        """Say what comes next; until the next ``begin`` no step is awaited."""
        if watchdog.heart:
            watchdog.heart.enter(phase, step)

    def should_stop(self) -> bool:
        return self.actor is not None and ray.get(self.answer)


class Watcher:
    """Shows a run's progress and ends an attempt that hangs, while the driver waits."""

    def __init__(self, config: TrainConfig):
        actor = ray.remote(num_cpus=0)(ProgressActor)
        self.actor = actor.options(name=watchdog.actor_name(config.run_name)).remote()
        self.show = display_in_notebook() or display_on_terminal()
        self.records: list[dict] = []
        self.total = 0
        self.config, self.watchdog = config, watchdog.Watchdog(config.hang_timeout)
        self.ended: Exception | None = None
        self.guarding = threading.Lock()
        self.done = threading.Event()
        self.thread = threading.Thread(target=self.watch, daemon=True)

    def __enter__(self) -> Watcher:
        ray.get(self.actor.since.remote(0))  # until workers can find it
        self.thread.start()
        return self

    def __exit__(self, *_) -> None:
        self.done.set()
        self.thread.join()
        self.poll()
        ray.kill(self.actor)

    def stop_training(self, signal: str) -> None:
        """Make the workers save a checkpoint and return; say so at once."""
        last = ray.get(self.actor.stop.remote())
        self.show(
            f"{signal}: finishing step {last}, then saving; again: at once, unsaved",
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
            ray.get(self.actor.begin_attempt.remote())
            self.watchdog.begin_attempt()
            if isinstance(self.ended, watchdog.Hang):
                self.ended = None

    def guard(self) -> None:
        """Find a hang, have the ranks that answer write traces, kill all."""
        beats = ray.get(self.actor.last_beats.remote())
        what = self.watchdog.judge(beats, time.monotonic())
        if what and not self.ended:
            self.actor.dump.remote()
            time.sleep(watchdog.DUMP_S)
            self.ended = watchdog.Hang(what + watchdog.traces(self.config))
        if self.ended:
            self.watchdog.kill(beats)

    def furthest_step(self) -> int:
        """The furthest step that any attempt of this run has begun."""
        return ray.get(self.actor.furthest_step.remote())

    def watch(self) -> None:
        while not self.done.wait(0.5):
            self.poll()
            with self.guarding:
                self.guard()

    def poll(self) -> None:
        for record in ray.get(self.actor.since.remote(len(self.records))):
            self.records.append(record)
            if "notice" in record:
                self.show(record["notice"], done=True)
            elif "total" in record:
                self.total = record["total"]
                if record["start"]:
                    self.show(f"resumed after step {record['start']}", done=True)
            elif "eval_loss" in record:
                text = f"step {record['step']}: eval_loss {record['eval_loss']:.4f}"
                self.show(text, done=True)
            else:
                self.show(line(record, self.total), record["step"] == self.total)


def line(record: dict, total: int) -> str:
    """One record as a line of text."""
    left = round((total - record["step"]) * record["step_time"])
    done = round(10 * record["step"] / total)
    text = (
        f"[{'#' * done}{'.' * (10 - done)}] step {record['step']}/{total}"
        f"  loss {record['loss']:.3f}  {record['tokens_per_second']:,.0f} tokens/s"
        f"  {left // 3600}:{left // 60 % 60:02}:{left % 60:02} left"
    )
    return text + (f"  MFU {record['mfu']:.0%}" if "mfu" in record else "")


def display_in_notebook() -> Callable[..., None] | None:
    """Update one output in place, so that only the last line stays on the page."""
    shell = sys.modules["IPython"].get_ipython() if "IPython" in sys.modules else None
    if not hasattr(shell, "kernel"):  # the libraries may be loaded outside of one
        return None
    from IPython.display import display  # here: notebooks only

    finished: list[str] = []
    handle = display({"text/plain": ""}, raw=True, display_id=True)

    def show(text: str, done: bool = False) -> None:
        handle.update({"text/plain": "\n".join([*finished, text])}, raw=True)
        if done:
            finished.append(text)

    return show


def display_on_terminal() -> Callable[..., None]:
    """Rewrite one line on a terminal; plain lines when the output is a file."""
    live = sys.stdout.isatty()

    def show(text: str, done: bool = False) -> None:
        if live:  # a line that wraps could not be rewritten
            text = "\r\x1b[K" + text[: shutil.get_terminal_size().columns - 1]
        print(text, end="\n" if done or not live else "", flush=True)

    return show
