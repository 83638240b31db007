"""How progress is shown: one line that changes, in a notebook or on a terminal."""

from __future__ import annotations

import shutil
import sys


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


class Terminal:
    """Rewrites one line on a terminal; plain lines when the output is a file.

    ``live`` tells, here and in a notebook, whether a line can be rewritten.
    """

    def __init__(self):
        self.live = sys.stdout.isatty()
        self.is_open = False  # whether the cursor stands behind a line

    def show(self, text: str, done: bool = False) -> None:
        """Show a line that the next one replaces, or that stays if it is ``done``."""
        if self.live and not done:  # a line that wraps could not be rewritten
            text = text[: shutil.get_terminal_size().columns - 1]
        self.is_open = self.live and not done
        print("\r\x1b[K" * self.live + text, end="\n"[self.is_open :], flush=True)

    def end(self) -> None:
        """Give what is printed next, such as an error, a line of its own."""
        if self.is_open:
            print(flush=True)
        self.is_open = False


class Notebook:
    """Updates one output in place, so that only the last line stays on the page."""

    live = True

    def __init__(self):
        from IPython.display import display  # here: notebooks only

        self.finished: list[str] = []
        self.handle = display({"text/plain": ""}, raw=True, display_id=True)

    def show(self, text: str, done: bool = False) -> None:
        page = [*self.finished, text]
        self.handle.update({"text/plain": "\n".join(page)}, raw=True)
        if done:
            self.finished = page

    def end(self) -> None:
        """Nothing is left to do: others print to outputs of their own."""


def here() -> Terminal | Notebook:
    shell = sys.modules["IPython"].get_ipython() if "IPython" in sys.modules else None
    # Its libraries may be loaded outside of a notebook.
    return Notebook() if hasattr(shell, "kernel") else Terminal()
