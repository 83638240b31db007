"""A trace of a few steps: torch.profiler, and on GPUs a snapshot of their memory."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from pathlib import Path
from types import SimpleNamespace

import torch
import torch.distributed as dist

from tp2d_lib.checkpoint import storage
from tp2d_lib.config import TrainConfig


@contextmanager
def profiler(
    config: TrainConfig,
    during: Callable[[str], AbstractContextManager] = nullcontext,
) -> Iterator:
    """Trace ``profile_steps`` steps after the first; call ``step()`` after each step.

    Each rank writes ``profile/rank0.json.gz`` (with its own number) to the run's
    folder, to be opened at ui.perfetto.dev; on a GPU also ``rank0.pickle``, for
    pytorch.org/memory_viz. The traces are written inside a ``during("profile")``,
    because that may take minutes.
    """
    if config.profile_steps == 0:
        yield SimpleNamespace(step=lambda: None)
        return
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
                storage.write(config, f"profile/{path.name}", path.read_bytes())

    steps = torch.profiler.schedule(
        wait=0, warmup=1, active=config.profile_steps, repeat=1
    )
    trace = torch.profiler.profile(schedule=steps, on_trace_ready=keep)

    def step() -> None:
        writes = trace.current_action == torch.profiler.ProfilerAction.RECORD_AND_SAVE
        with during("profile") if writes else nullcontext():
            trace.step()

    with ExitStack() as writing, trace:
        yield SimpleNamespace(step=step)
        writing.enter_context(during("profile"))  # at the end of a run that is shorter
