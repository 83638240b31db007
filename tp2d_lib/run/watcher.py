"""The driver's view of a run: shows progress, passes stops on, ends what hangs."""

from __future__ import annotations

import threading
import time

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from tp2d_lib.config import ConfigError, TrainConfig
from tp2d_lib.mesh import layout
from tp2d_lib.run import display, watchdog
from tp2d_lib.run.progress import ProgressActor


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
