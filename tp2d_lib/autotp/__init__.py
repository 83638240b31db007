"""The DeepSpeed engine: AutoTP tensor parallelism with ZeRO data parallelism."""

import os
import sys

import torch

if not torch.cuda.is_available():  # before DeepSpeed's import, which looks for hardware
    os.environ.setdefault("DS_ACCELERATOR", "cpu")

# What DeepSpeed imports for others, in every process: MLflow, where it is installed, a
# second; and Muon, whose functions are decorated with torch.compile, which imports the
# Inductor, almost two seconds, unless compiling is off.
try:
    _mlflow = sys.modules.get("mlflow")
    _off = os.environ.get("TORCHDYNAMO_DISABLE", "")
    os.environ["TORCHDYNAMO_DISABLE"] = "1"
    if _mlflow is None:
        sys.modules["mlflow"] = None  # as if it were not installed
    import deepspeed.runtime.zero.muon.muon_optimizer  # noqa: F401
finally:
    os.environ["TORCHDYNAMO_DISABLE"] = _off
    if _mlflow is None:
        del sys.modules["mlflow"]

from tp2d_lib.autotp.engine import AutoTPEngine, build_engine, train_func
from tp2d_lib.autotp.preflight import check
from tp2d_lib.autotp.universal import prepare_start

__all__ = ["AutoTPEngine", "build_engine", "check", "prepare_start", "train_func"]
