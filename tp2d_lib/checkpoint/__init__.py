"""Checkpoints of a run: written, verified, restored."""

from typing import Any

from tp2d_lib.checkpoint.integrity import CheckpointError, checksums, verify

WITH_RAY = (
    "check_start",
    "commit",
    "history",
    "last_of",
    "report",
    "restore",
    "start_of",
)
__all__ = ["CheckpointError", "checksums", "verify", *WITH_RAY]


def __getattr__(name: str) -> Any:
    """Import names of ``ray_train`` on demand, because an engine does not need Ray."""
    if name not in WITH_RAY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from tp2d_lib.checkpoint import ray_train

    return getattr(ray_train, name)
