"""The DeepSpeed engine: AutoTP tensor parallelism with ZeRO data parallelism."""

import os
import sys

import torch

if not torch.cuda.is_available():  # before DeepSpeed's import, which looks for hardware
    os.environ.setdefault("DS_ACCELERATOR", "cpu")

# DeepSpeed's autotuner imports MLflow where it is installed: a second per process.
if (_mlflow := sys.modules.get("mlflow")) is None:
    sys.modules["mlflow"] = None  # as if it were not
import deepspeed  # noqa: F401

if _mlflow is None:
    del sys.modules["mlflow"]

from tp2d_lib.autotp.engine import AutoTPEngine, build_engine, train_func
from tp2d_lib.autotp.preflight import check
from tp2d_lib.autotp.universal import prepare_start

__all__ = ["AutoTPEngine", "build_engine", "check", "prepare_start", "train_func"]
