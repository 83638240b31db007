"""How progress is shown: one line that changes, in a notebook or on a terminal."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Callable


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


def in_notebook() -> Callable[..., None] | None:
    """Update one output in place, so that only the last line stays on the page.

    Like ``on_terminal``, it returns a function whose attribute ``live`` tells whether a
    line can be rewritten.
    """
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

    show.live = True
    return show


def on_terminal() -> Callable[..., None]:
    """Rewrite one line on a terminal; plain lines when the output is a file."""
    live = sys.stdout.isatty()

    def show(text: str, done: bool = False) -> None:
        if live:  # a line that wraps could not be rewritten
            text = "\r\x1b[K" + text[: shutil.get_terminal_size().columns - 1]
        print(text, end="\n" if done or not live else "", flush=True)

    show.live = live
    return show
