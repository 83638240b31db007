"""Training runs to time: a step on each mesh, the two engines."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from functools import cache, partial
from shutil import which

import torch
import torch.distributed as dist
from transformers import AutoModelForCausalLM

from scripts.benchmarks.harness import CORES, Table, alternate, processes
from tp2d_lib import data
from tp2d_lib.config import TrainConfig
from tp2d_lib.fsdp import build_engine
from tp2d_lib.mesh import build_mesh
from tp2d_lib.presets import build_config

Training = tuple[Callable, Iterator]  # one step, and the batches it is given
MESHES = ((2, 2), (4, 1), (1, 4))  # (dp_size, tp_size)
ROWS = 8  # in a global batch
BURST = 5  # steps timed as one


def bench_config(storage: str, dp_size: int, tp_size: int, **settings) -> TrainConfig:
    """The demo with the same global batch on every mesh, and no end of data."""
    settings |= {"dp_size": dp_size, "tp_size": tp_size, "num_epochs": 1000}
    settings = {"batch_size_per_gpu": ROWS // dp_size} | settings
    return build_config("demo", storage, max_steps=10_000, **settings)


def same_rows(config: TrainConfig) -> Iterator[list[dict[str, torch.Tensor]]]:
    """The same random rows again and again, equal on all ranks."""
    shape = (config.batch_size_per_gpu, config.seq_length)
    ids = torch.randint(2000, shape, generator=torch.Generator())
    batch = [{"input_ids": ids, "labels": ids}]
    return iter(lambda: batch, None)


@cache  # built by the first burst, used by all
def mesh_training(
    storage: str, dp_size: int, tp_size: int, compile: bool = False
) -> Training:
    config = bench_config(storage, dp_size, tp_size, compile=compile)
    mesh = build_mesh(dp_size, tp_size)
    return build_engine(config, mesh).step, iter(data.build_dataloader(config, mesh))


@cache
def autotp_training(
    storage: str, stage: int, overlap: bool = True, compile: bool = False
) -> Training:
    """DeepSpeed on the dp2 x tp2 mesh; a process keeps the first mesh it was given."""
    from tp2d_lib import autotp
    from tp2d_lib.autotp import zero

    def settings(config: TrainConfig) -> dict:
        written = zero.deepspeed_config(config)
        written["tensor_parallel"]["tp_overlap_comm"] = overlap
        return written

    config = bench_config(storage, 2, 2, zero_stage=stage, compile=compile)
    mesh = build_mesh(2, 2)
    engine = autotp.build_engine(config, mesh, settings)
    return engine.step, iter(data.build_dataloader(config, mesh))


@cache
def plain_training(storage: str) -> Training:
    """What you would write without this project, with the same rows and settings."""
    config = bench_config(storage, dp_size=1, tp_size=1)
    loader = data.BatchLoader(config, data.prepare(config), dp_rank=0)
    model = AutoModelForCausalLM.from_pretrained(config.model_name, dtype=torch.float32)
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), config.learning_rate, fused=True)

    def step(batch: list[dict[str, torch.Tensor]]) -> None:
        model(**batch[0], use_cache=False).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), config.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad()

    return step, iter(loader)


def burst(steps: int, build: Callable, *args) -> tuple[float, int]:
    """Seconds a few steps took in this process, and the real tokens in its rows."""
    step, batches = build(*args)
    dist.barrier()
    start, real = time.perf_counter(), 0
    for _ in range(steps):
        batch = next(batches)
        step(batch)
        real += sum(int((micro["labels"] != data.IGNORED).sum()) for micro in batch)
    return time.perf_counter() - start, real


def step_time(run: Callable, build: Callable, *args, steps: int = BURST) -> float:
    """Milliseconds per step, on the slowest rank."""
    times = run(burst, steps, build, *args)
    return max(seconds for seconds, _ in times) / steps * 1000


def compare_steps(rounds: int, storage: str) -> Table:
    """1. Step time: one optimizer step on the same 8 rows of 128 tokens, demo model,
    fp32. The plain loop is transformers and torch AdamW.
    """

    with processes(4, threads=1) as ranks, processes(1, threads=CORES) as one:
        alone = partial(step_time, one, plain_training, storage)
        measures = {f"one process x {CORES} threads, plain loop": alone}
        for dp, tp in MESHES:
            name = f"mesh dp{dp} x tp{tp}, 4 processes x 1 thread"
            measures[name] = partial(step_time, ranks, mesh_training, storage, dp, tp)
        alternate(1, measures)  # the first steps are slow
        return "ms per step", alternate(rounds, measures)


def compare_engines(rounds: int, storage: str) -> Table:
    """2. The two engines: one optimizer step on the same 8 rows of 128 tokens, demo
    model, fp32, the same dp2 x tp2 mesh of 4 processes x 1 thread.
    """
    with processes(4, threads=1) as ranks:
        time_of = partial(partial, step_time, ranks)
        measures = {"FSDP2 + DTensor": time_of(mesh_training, storage, 2, 2)}
        for stage in range(4):
            measures[f"AutoTP, ZeRO {stage}"] = time_of(autotp_training, storage, stage)
        no_overlap = time_of(autotp_training, storage, 1, False)
        measures["AutoTP, ZeRO 1, no tp_overlap_comm"] = no_overlap
        if which("g++"):  # torch.compile needs it on a CPU
            compiled = time_of(mesh_training, storage, 2, 2, True)
            measures["FSDP2 + DTensor, compiled"] = compiled
            compiled = time_of(autotp_training, storage, 1, True, True)
            measures["AutoTP, ZeRO 1, compiled"] = compiled
        alternate(1, measures)  # the first steps are slow
        return "ms per step", alternate(rounds, measures)
