"""Between driver and workers, while they train: progress one way, "stop" the other."""

from __future__ import annotations

import shutil
import sys
import threading
from collections.abc import Callable

import ray


class Board:
    """Records of one run, in the order they came; and after which step to stop."""

    def __init__(self):
        self.records: list[dict] = []
        self.last_asked = 0
        self.stop_after: int | None = None

    def add(self, record: dict) -> None:
        self.records.append(record)

    def since(self, count: int) -> list[dict]:
        return self.records[count:]

    def stop(self) -> None:
        """Stop after the first step that no rank has asked about yet."""
        self.stop_after = self.stop_after or self.last_asked + 1

    def ends_with(self, step: int) -> bool:
        """Whether a step is the last; every rank asks, and all are told the same."""
        self.last_asked = max(self.last_asked, step)
        return self.stop_after is not None and step >= self.stop_after


def board_name(run_name: str | None) -> str:
    return f"tp2d-progress-{run_name}"


class Link:
    """A worker's end of the board; silent when nobody watches."""

    def __init__(self, run_name: str | None):
        import torch.distributed as dist  # here, so that the board's process need not

        self.speaks = dist.get_rank() == 0
        self.answer = None
        try:
            self.board = ray.get_actor(board_name(run_name))
        except ValueError:  # nobody is watching
            self.board = None

    def publish(self, record: dict) -> None:
        if self.board and self.speaks:
            self.board.add.remote(record)

    def ask(self, step: int) -> None:
        """Ask whether a step is the last, as it begins: the answer takes a while."""
        if self.board:
            self.answer = self.board.ends_with.remote(step)

    def told_to_stop(self) -> bool:
        return self.board is not None and ray.get(self.answer)


class Watcher:
    """Shows a run's board while the driver waits: ``with Watcher(run_name): fit()``."""

    def __init__(self, run_name: str):
        actor = ray.remote(num_cpus=0)(Board)
        self.board = actor.options(name=board_name(run_name)).remote()
        self.show = display_in_notebook() or display_on_terminal()
        self.records: list[dict] = []
        self.total = 0
        self.done = threading.Event()
        self.thread = threading.Thread(target=self.watch, daemon=True)

    def __enter__(self) -> Watcher:
        ray.get(self.board.since.remote(0))  # the workers must find it
        self.thread.start()
        return self

    def __exit__(self, *_) -> None:
        self.done.set()
        self.thread.join()
        self.poll()
        ray.kill(self.board)

    def stop_training(self) -> None:
        """Ask the workers to save a checkpoint and return."""
        self.board.stop.remote()

    def watch(self) -> None:
        while not self.done.wait(0.5):
            self.poll()

    def poll(self) -> None:
        for record in ray.get(self.board.since.remote(len(self.records))):
            self.records.append(record)
            if "notice" in record:
                self.show(record["notice"], done=True)
            elif "total" in record:
                self.total = record["total"]
                if record["start"]:
                    self.show(f"resumed after step {record['start']}", done=True)
            elif "eval_loss" in record:
                said = f"step {record['step']}: eval_loss {record['eval_loss']:.4f}"
                self.show(said, done=True)
            else:
                self.show(line(record, self.total), record["step"] == self.total)


def line(record: dict, total: int) -> str:
    """One record as a sentence of figures."""
    left = round((total - record["step"]) * record["step_time"])
    done = round(10 * record["step"] / total)
    text = (
        f"[{'#' * done}{'.' * (10 - done)}] step {record['step']}/{total}"
        f"  loss {record['loss']:.3f}  {record['tokens_per_second']:,.0f} tokens/s"
        f"  {left // 3600}:{left // 60 % 60:02}:{left % 60:02} left"
    )
    return text + (f"  MFU {record['mfu']:.0%}" if "mfu" in record else "")


def display_in_notebook() -> Callable[..., None] | None:
    """Update one output in place, so that only the last line stays in the page."""
    if "ipykernel" not in sys.modules:
        return None
    from IPython.display import display

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
