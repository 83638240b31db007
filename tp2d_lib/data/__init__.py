"""From documents to batches: tokenized once, then read by dp rank."""

from tp2d_lib.data.checks import open_rows
from tp2d_lib.data.loader import (
    IGNORED,
    BatchLoader,
    build_dataloader,
    micro_batch,
    valid_tokens,
)
from tp2d_lib.data.rows import check, describe, pack_of, prepare

__all__ = [
    "IGNORED",
    "BatchLoader",
    "build_dataloader",
    "check",
    "describe",
    "micro_batch",
    "open_rows",
    "pack_of",
    "prepare",
    "valid_tokens",
]
