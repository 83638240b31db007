"""Is it still the same process? A PID alone does not tell: it is used again."""

from __future__ import annotations

import os
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
