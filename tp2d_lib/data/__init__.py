"""From documents to batches: tokenised once, then read by dp rank."""

from tp2d_lib.data.loader import (
    IGNORED,
    BatchLoader,
    build_dataloader,
    micro_batch,
    valid_tokens,
)
from tp2d_lib.data.rows import check, prepare

__all__ = [
    "IGNORED",
    "BatchLoader",
    "build_dataloader",
    "check",
    "micro_batch",
    "prepare",
    "valid_tokens",
]
