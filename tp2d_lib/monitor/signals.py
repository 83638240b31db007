"""Ctrl-C and SIGTERM: the first stops a run after its step, the second at once."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager


@contextmanager
def on_first_signal(react: Callable[[], None]) -> Iterator[list[str]]:
    """Call ``react`` at the first signal and restore the old handlers for the next.

    Yields a list that then holds its name. Has an effect only in the main thread.
    """
    caught: list[str] = []
    if threading.current_thread() is not threading.main_thread():
        yield caught
        return
    both = (signal.SIGINT, signal.SIGTERM)
    before = {number: signal.getsignal(number) for number in both}

    def restore() -> None:
        for number, handler in before.items():
            signal.signal(number, handler)

    def handle(number, frame) -> None:
        restore()
        caught.append(signal.Signals(number).name)
        react()

    for number in both:
        signal.signal(number, handle)
    try:
        yield caught
    finally:
        restore()
