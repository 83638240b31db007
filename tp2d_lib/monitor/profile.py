"""A trace of a few steps: torch.profiler, and on GPUs a snapshot of their memory."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import torch
import torch.distributed as dist

from tp2d_lib.config import TrainConfig


@contextmanager
def profiler(config: TrainConfig, write: Callable | None = None) -> Iterator:
    """Trace ``profile_steps`` steps after the first; call ``step()`` after each step.

    Each rank writes ``profile/rank0.json.gz`` (with its own number) to the run's
    folder, to be opened at ui.perfetto.dev; on a GPU also ``rank0.pickle``, for
    pytorch.org/memory_viz. ``write(config, name, content)`` puts a file there; by
    default through Arrow.
    """
    if config.profile_steps == 0:
        yield SimpleNamespace(step=lambda: None)
        return
    if write is None:
        from tp2d_lib.checkpoint.storage import write  # here: it needs Arrow

    on_gpu = config.device == "cuda"
    if on_gpu:  # documented under these private names
        torch.cuda.memory._record_memory_history(max_entries=100_000)

    def keep(trace: torch.profiler.profile) -> None:
        name = f"rank{dist.get_rank()}"
        with tempfile.TemporaryDirectory(prefix="tp2d-") as folder:
            trace.export_chrome_trace(f"{folder}/{name}.json.gz")
            if on_gpu:
                torch.cuda.memory._dump_snapshot(f"{folder}/{name}.pickle")
                torch.cuda.memory._record_memory_history(enabled=None)
            for path in Path(folder).iterdir():
                write(config, f"profile/{path.name}", path.read_bytes())

    steps = torch.profiler.schedule(
        wait=0, warmup=1, active=config.profile_steps, repeat=1
    )
    with torch.profiler.profile(schedule=steps, on_trace_ready=keep) as profile:
        yield profile
