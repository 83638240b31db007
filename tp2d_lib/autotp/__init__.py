"""The DeepSpeed engine: AutoTP tensor parallelism with ZeRO data parallelism."""

import os

import torch

if not torch.cuda.is_available():  # before DeepSpeed's import, which looks for hardware
    os.environ.setdefault("DS_ACCELERATOR", "cpu")

from tp2d_lib.autotp.engine import AutoTPEngine, build_engine, train_func
from tp2d_lib.autotp.preflight import check

__all__ = ["AutoTPEngine", "build_engine", "check", "train_func"]
