"""One writer: a run's folder belongs to one driver at a time, who keeps a lease in it.

A lease is a file whose number its holder raises every few seconds. Whoever waits for it
watches that number: clocks of two machines may differ. It needs no lock of the file
system, so the last to write wins; the other finds that out when it next reads.
"""

from __future__ import annotations

import json
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from uuid import uuid4

from tp2d_lib.checkpoint import storage
from tp2d_lib.config import ConfigError, TrainConfig

LEASE = "lease.json"
LEASE_S = 20.0  # a holder whose number stands still for so long has lost its lease
SETTLE_S = 1.0  # until those who wrote at the same moment have all written

holder: str | None = None  # on a worker: that of the driver which started it


class LeaseLost(RuntimeError):
    """Another process has taken over the run, so this one must not write any more."""


def check(config: TrainConfig) -> None:
    """Find on a worker that its driver, perhaps suspended, no longer holds the lease.

    Raises:
        LeaseLost: another one does, or did.
    """
    if holder is not None and (read(config) or {}).get("holder") != holder:
        raise lost(config)


def lost(config: TrainConfig) -> LeaseLost:
    return LeaseLost(
        f"run_name={config.run_name!r} was taken over by another process, so this one "
        "stops without a checkpoint"
    )


def read(config: TrainConfig) -> dict | None:
    """The lease as it is now; None if there is none, or none that can be read."""
    try:
        return json.loads(storage.file(config, LEASE).read_bytes())
    except (FileNotFoundError, ValueError):
        return None


def is_dead(found: dict) -> bool:
    """Whether the holder is a process of this machine that is no longer there."""
    here = found["machine"] is not None and found["machine"] == machine()
    return here and started(found["pid"]) != found["started"]


def machine() -> str | None:
    """This boot and PID namespace: where a PID has a meaning. None without /proc."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return None


def started(pid: int) -> str | None:
    """When a process of this machine started, in ticks; None if it is dead.

    A PID alone does not tell whether it is still the same one: it is used again.
    """
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return None
    state, *others = stat.rpartition(")")[2].split()
    return None if state in "ZX" else others[18]


@contextmanager
def hold(config: TrainConfig, seconds: float = LEASE_S) -> Iterator[Lease]:
    """Hold the lease of the run's folder inside a ``with`` block.

    Args:
        seconds: how long a holder that cannot be looked up must be silent.

    Raises:
        ConfigError: another living process holds it.
    """
    lease = Lease(config, seconds)
    lease.wait_for_holder()
    try:
        lease.take()
        lease.thread.start()
        yield lease
    finally:
        lease.release()


class Lease:
    """The lease of one driver, renewed by a thread until it is released or lost."""

    def __init__(self, config: TrainConfig, seconds: float):
        self.config, self.seconds = config, seconds
        pid = os.getpid()
        self.content = {
            "holder": uuid4().hex,
            "beat": 0,
            "host": socket.gethostname(),
            "pid": pid,
            "machine": machine(),
            "started": started(pid),
            "since": time.strftime("%Y-%m-%d %H:%M:%S"),
        }
        self.lost: LeaseLost | None = None
        self.react: Callable[[LeaseLost], None] = lambda error: None
        self.done = threading.Event()
        self.thread = threading.Thread(target=self.renew, daemon=True)

    @property
    def holder(self) -> str:
        return self.content["holder"]

    def is_mine(self) -> bool:
        return (read(self.config) or {}).get("holder") == self.holder

    def write(self) -> None:
        storage.write(self.config, LEASE, json.dumps(self.content, indent=1).encode())

    def wait_for_holder(self) -> None:
        """Return once no living process holds the lease; a living one is an error."""
        first, began = read(self.config), time.monotonic()
        while (found := read(self.config)) and not is_dead(found):
            if found != first:
                raise self.refusal(found)
            if time.monotonic() > began + self.seconds:
                return
            time.sleep(self.seconds / 40)

    def take(self) -> None:
        self.write()
        time.sleep(SETTLE_S)
        if not self.is_mine():
            raise self.refusal(read(self.config) or self.content)

    def refusal(self, found: dict) -> ConfigError:
        return ConfigError(
            f"run_name={self.config.run_name!r} is being trained by process "
            f"{found['pid']} on {found['host']} (since {found['since']}), and only one "
            f"process at a time may; try run_name='{self.config.run_name}-2', or end "
            "that process first"
        )

    def on_loss(self, react: Callable[[LeaseLost], None]) -> None:
        """Call ``react`` if the lease is lost, at once if it already is."""
        self.react = react
        if self.lost:
            react(self.lost)

    def renew(self) -> None:
        while not self.done.wait(self.seconds / 5):
            with suppress(OSError):  # a store that is briefly away
                if not self.is_mine():
                    self.lost = lost(self.config)
                    return self.react(self.lost)
                self.content["beat"] += 1
                self.write()

    def release(self) -> None:
        """Delete the lease, unless it is another's by now."""
        self.done.set()
        if self.thread.ident:
            self.thread.join()
        with suppress(OSError):  # else this would hide why the run ends
            if self.is_mine():
                storage.remove(self.config, LEASE)
