"""Checkpoints of a run: written, verified, restored."""

from importlib import import_module
from typing import Any

from tp2d_lib.checkpoint.manifest import CheckpointError, checksums, last_of, verify
from tp2d_lib.checkpoint.resume import start_of

LAZY = {  # name -> its module, which needs Arrow or Ray
    "as_checkpoint": "ray_train",
    "await_earlier": "saving",
    "commit": "ray_train",
    "history": "ray_train",
    "report": "ray_train",
    "restore": "saving",
}
__all__ = ["CheckpointError", "checksums", "last_of", "start_of", "verify", *LAZY]


def __getattr__(name: str) -> Any:
    """Import some names on demand, because an engine needs neither Arrow nor Ray."""
    if name not in LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{LAZY[name]}"), name)
