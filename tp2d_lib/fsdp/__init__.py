"""The PyTorch engine: DTensor tensor parallelism inside FSDP2 data parallelism."""

from tp2d_lib.fsdp.engine import FSDPEngine, build_engine, train_func
from tp2d_lib.fsdp.preflight import check

__all__ = ["FSDPEngine", "build_engine", "check", "train_func"]
