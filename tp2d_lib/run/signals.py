"""Ctrl-C and SIGTERM: the first stops a run after its step, the second at once."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager


@contextmanager
def handlers_kept() -> Iterator[None]:
    """Undo what Ray does to SIGTERM when it starts: to exit without a word."""
    before = signal.getsignal(signal.SIGTERM)
    yield
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, before)


@contextmanager
def on_first_signal(react: Callable[[str], None]) -> Iterator[list[str]]:
    """Call ``react`` with the first signal's name; the next one interrupts at once.

    Yields a list that then holds its name. Has an effect only in the main thread.
    """
    caught: list[str] = []
    if threading.current_thread() is not threading.main_thread():
        yield caught
        return
    both = (signal.SIGINT, signal.SIGTERM)
    before = {number: signal.getsignal(number) for number in both}

    def handle(number, frame) -> None:
        for other in both:  # Ray's own handler of SIGTERM would exit without a word
            signal.signal(other, signal.default_int_handler)
        caught.append(signal.Signals(number).name)
        react(caught[0])

    for number in both:
        signal.signal(number, handle)
    try:
        yield caught
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
