"""What Linux says of processes: which one has a PID, and how much memory this one has.

A PID alone does not tell whether it is still the same process: it is used again.
"""

from __future__ import annotations

import os
import re
from pathlib import Path


def machine() -> str | None:
    """This boot and PID namespace: where a PID has a meaning. None without /proc."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return None


def started(pid: int) -> str | None:
    """When a process of this machine started, in ticks; None if it is dead."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return None
    state, *others = stat.rpartition(")")[2].split()
    return None if state in "ZX" else others[18]


def resident_bytes(kind: str) -> int:
    """Memory of this process, of a kind in Linux's ``/proc/self/status``.

    ``RssAnon`` is that of no file, ``RssFile`` that of mapped files, ``VmHWM`` the peak
    of both together.

    Raises:
        OSError: there is no such file; not on Linux.
    """
    status = Path("/proc/self/status").read_text()
    [kilobytes] = re.findall(rf"^{kind}:\s+(\d+) kB$", status, re.M)
    return int(kilobytes) * 1024
