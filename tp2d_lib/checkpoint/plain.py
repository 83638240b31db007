"""A checkpoint is data: nothing in it may run when it is loaded."""

from __future__ import annotations

import os
import pickle
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch.serialization import safe_globals

from tp2d_lib.checkpoint.manifest import CheckpointError

FORCE = "TORCH_FORCE_WEIGHTS_ONLY_LOAD"  # overrides a caller's weights_only=False


@contextmanager
def only(path: object, allowed: Iterable[type] = ()) -> Iterator[None]:
    """Let ``torch.load`` build tensors and plain values only, whoever calls it.

    Args:
        path: what is loaded, for the message.
        allowed: classes that it may build as well.

    Raises:
        CheckpointError: the file needs more.
    """
    before = os.environ.get(FORCE)
    os.environ[FORCE] = "1"
    try:
        with safe_globals(list(allowed)):
            yield
    except pickle.UnpicklingError as error:
        raise refused(path, error) from error
    finally:
        del os.environ[FORCE]
        if before is not None:
            os.environ[FORCE] = before


def check(path: object, allowed: Iterable[type] = ()) -> None:
    """Refuse a file of ``torch.save`` that needs more; no tensor of it is read.

    Raises:
        CheckpointError: with the name of what it needs.
    """
    try:
        with safe_globals(list(allowed)):
            torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:  # whatever a file made up by a stranger leads to
        raise refused(path, error) from error


def refused(path: object, error: Exception) -> CheckpointError:
    name = re.search(r"GLOBAL (\S+)", str(error))  # as PyTorch says it
    found = repr(name[1]) if name else f"something else ({type(error).__name__})"
    return CheckpointError(
        f"{path} must hold tensors and plain values only, but holds {found}; load it "
        "with PyTorch yourself, in a sandbox, if you trust its author"
    )
