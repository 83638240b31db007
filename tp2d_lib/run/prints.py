"""What a user's own code prints on rank 0 is shown beside the progress."""

from __future__ import annotations

import contextlib
import io
import sys
import sysconfig
from collections.abc import Callable

LIBRARIES = tuple(map(sysconfig.get_path, ("purelib", "platlib", "stdlib")))


class Prints(io.TextIOBase):
    """Standard output that passes whole lines on, but those of libraries.

    All goes to the worker's log as well.
    """

    def __init__(self, show: Callable[[str], None], log):
        self.show, self.log, self.begun = show, log, ""

    def write(self, text: str) -> int:
        caller = sys._getframe(1)
        if caller.f_code.co_name == "redirected_print":  # Ray Train's, for its logs
            caller = caller.f_back
        if not caller.f_code.co_filename.startswith(LIBRARIES):
            *lines, self.begun = (self.begun + text).split("\n")
            for line in lines:
                self.show(line)
        return self.log.write(text)

    def flush(self) -> None:
        self.log.flush()


def shown(show: Callable[[str], None]) -> contextlib.redirect_stdout:
    """Show what is printed inside the ``with``."""
    return contextlib.redirect_stdout(Prints(show, sys.stdout))
