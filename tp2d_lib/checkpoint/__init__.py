"""Checkpoints of a run: written, verified, restored."""

from typing import Any

from tp2d_lib.checkpoint.manifest import CheckpointError, checksums, last_of, verify
from tp2d_lib.checkpoint.resume import start_of
from tp2d_lib.checkpoint.saving import restore

WITH_RAY = ("commit", "history", "report")
__all__ = [
    "CheckpointError",
    "checksums",
    "last_of",
    "restore",
    "start_of",
    "verify",
    *WITH_RAY,
]


def __getattr__(name: str) -> Any:
    """Import names of ``ray_train`` on demand, because an engine does not need Ray."""
    if name not in WITH_RAY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from tp2d_lib.checkpoint import ray_train

    return getattr(ray_train, name)
