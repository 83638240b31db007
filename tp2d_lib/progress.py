"""Live progress: rank 0 tells a small actor, the driver shows what it heard."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable

import ray


@ray.remote(num_cpus=0)
class Board:
    """Records of one run, in the order they came."""

    def __init__(self):
        self.records: list[dict] = []

    def add(self, record: dict) -> None:
        self.records.append(record)

    def since(self, count: int) -> list[dict]:
        return self.records[count:]


def board_name(run_name: str | None) -> str:
    return f"tp2d-progress-{run_name}"


def publisher(run_name: str | None) -> Callable[[dict], None]:
    """A function that sends a record to the run's board; silent on other ranks."""
    import torch.distributed as dist  # here, so that the board's process need not

    if dist.get_rank() != 0:
        return lambda record: None
    try:
        board = ray.get_actor(board_name(run_name))
    except ValueError:  # nobody is watching
        return lambda record: None
    return lambda record: board.add.remote(record) and None


class Watcher:
    """Shows a run's board while the driver waits: ``with Watcher(run_name): fit()``."""

    def __init__(self, run_name: str):
        self.board = Board.options(name=board_name(run_name)).remote()
        self.show = display_in_notebook() or display_on_terminal()
        self.records: list[dict] = []
        self.total = 0
        self.stop = threading.Event()
        self.thread = threading.Thread(target=self.watch, daemon=True)

    def __enter__(self) -> Watcher:
        ray.get(self.board.since.remote(0))  # the workers must find it
        self.thread.start()
        return self

    def __exit__(self, *_) -> None:
        self.stop.set()
        self.thread.join()
        self.poll()
        ray.kill(self.board)

    def watch(self) -> None:
        while not self.stop.wait(0.5):
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
            else:
                self.show(line(record, self.total), record["step"] == self.total)


def line(record: dict, total: int) -> str:
    """One record as a sentence of figures."""
    left = (total - record["step"]) * record["step_time"]
    done = round(20 * record["step"] / total)
    text = (
        f"[{'#' * done}{'.' * (20 - done)}] step {record['step']}/{total}"
        f"  loss {record['loss']:.3f}  {record['tokens_per_second']:,.0f} tokens/s"
        f"  {record['step_time']:.2f} s/step  {left:.0f} s left"
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
        end = "\n" if done or not live else ""
        print(f"\r{text:<79}" if live else text, end=end, flush=True)

    return show
