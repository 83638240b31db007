"""Speed and memory, side by side: python scripts/bench.py [--rounds N] [--only A,B]

Everything runs on the CPU, offline, on the same cores. A round measures every row once,
the next round in reverse order, and a ratio divides two values of one round: a machine
that slows down slows both.
"""

from __future__ import annotations

import os

# Before anything imports torch or huggingface_hub; the processes started here inherit.
os.environ.update(
    CUDA_VISIBLE_DEVICES="",
    DS_ACCELERATOR="cpu",
    HF_HUB_OFFLINE="1",
    HF_HUB_DISABLE_PROGRESS_BARS="1",  # transformers follows it
    HF_DATASETS_DISABLE_PROGRESS_BARS="1",
)

import argparse
import multiprocessing
import signal
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import replace
from functools import cache, partial
from pathlib import Path
from shutil import which
from statistics import median

import numpy as np
import torch
import torch.distributed as dist
from transformers import AutoModelForCausalLM, Qwen2Config

from tp2d_lib import data
from tp2d_lib.config import TrainConfig
from tp2d_lib.data import demo
from tp2d_lib.fsdp import build_engine
from tp2d_lib.mesh import build_mesh
from tp2d_lib.presets import build_config

MESHES = ((2, 2), (4, 1), (1, 4))  # (dp_size, tp_size)
Table = tuple[str, dict[str, list[float]]]  # the unit, and a list of values by row
Training = tuple[Callable, Iterator]  # one step, and the batches it is given
ROWS = 8  # in a global batch
BURST = 5  # steps timed as one
STATUS = Path("/proc/self/status")
AFFINITY = getattr(os, "sched_getaffinity", lambda _: range(os.cpu_count() or 1))
CORES = len(AFFINITY(0))


def join(rank: int, world_size: int, threads: int, store: str) -> None:
    """The first thing each process does."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent
    torch.set_num_threads(threads)
    ranks = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world_size}
    os.environ.update({name: str(value) for name, value in ranks.items()})
    dist.init_process_group(
        "gloo", init_method=f"file://{store}", rank=rank, world_size=world_size
    )


@contextmanager
def processes(count: int, threads: int) -> Iterator[Callable]:
    """A gloo group; yields `run(function, *args)`: the answers, in rank order."""
    spawn = multiprocessing.get_context("spawn")
    with ExitStack() as stack:
        folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="tp2d-bench-"))
        ranks = []
        for rank in range(count):
            args = (rank, count, threads, f"{folder}/store")
            # One process each, so that every call reaches its own rank.
            ranks.append(stack.enter_context(ProcessPoolExecutor(1, spawn, join, args)))

        def run(function: Callable, *args) -> list:
            answers = [rank.submit(function, *args) for rank in ranks]
            for answer in as_completed(answers):
                answer.result()  # the first exception, while others may wait for it
            return [answer.result() for answer in answers]

        try:
            yield run
        except BaseException:
            for rank in ranks:  # whose end frees those who wait for it
                with suppress(BrokenProcessPool):
                    rank.submit(os._exit, 1)
            raise


def alternate(rounds: int, measures: dict[str, Callable]) -> dict[str, list]:
    """Every round takes each measurement once, the next round in reverse order."""
    values = {name: [] for name in measures}
    for index in range(rounds):
        for name in list(measures)[:: -1 if index % 2 else 1]:
            values[name].append(measures[name]())
    return values


def report(text: str, unit: str, values: dict[str, list[float]]) -> None:
    """Print a table; every row is also divided by the first one."""
    first, width = next(iter(values)), max(map(len, values))
    print(f"\n{text}\n\n    {'':{width}}{unit:>24}{'x the first row':>20}")
    for name, row in values.items():
        ratios = [a / b for a, b in zip(row, values[first], strict=True)]
        shown = "1" if name == first else spread(ratios)
        print(f"    {name:{width}}{spread(row):>24}{shown:>20}", flush=True)


def spread(row: list[float]) -> str:
    digits = 0 if median(row) >= 100 else 1 if median(row) >= 10 else 2
    middle, low, high = (f"{f(row):,.{digits}f}" for f in (median, min, max))
    return f"{middle} ({low}-{high})"


def bench_config(storage: str, dp_size: int, tp_size: int, **settings) -> TrainConfig:
    """The demo with the same global batch on every mesh, and no end of data."""
    settings |= {"dp_size": dp_size, "tp_size": tp_size, "num_epochs": 1000}
    settings["batch_size_per_gpu"] = ROWS // dp_size
    return build_config("demo", storage, max_steps=10_000, **settings)


def burst(build: Callable, *args) -> tuple[float, int]:
    """Seconds a few steps took in this process, and the real tokens in its rows."""
    step, batches = build(*args)
    dist.barrier()
    start, real = time.perf_counter(), 0
    for _ in range(BURST):
        batch = next(batches)
        step(batch)
        real += sum(int((micro["labels"] != data.IGNORED).sum()) for micro in batch)
    return time.perf_counter() - start, real


@cache  # built by the first burst, used by all
def mesh_training(
    storage: str, dp_size: int, tp_size: int, pack: bool = True, compile: bool = False
) -> Training:
    config = bench_config(storage, dp_size, tp_size, pack=pack, compile=compile)
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
    """What one writes without this project, with the same rows and settings."""
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
        return "ms a step", alternate(rounds, measures)


def step_time(run: Callable, build: Callable, *args) -> float:
    """Milliseconds of a step, on the slowest rank."""
    return max(seconds for seconds, _ in run(burst, build, *args)) / BURST * 1000


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
            compiled = time_of(mesh_training, storage, 2, 2, True, True)
            measures["FSDP2 + DTensor, compiled"] = compiled
            compiled = time_of(autotp_training, storage, 1, True, True)
            measures["AutoTP, ZeRO 1, compiled"] = compiled
        alternate(1, measures)  # the first steps are slow
        return "ms a step", alternate(rounds, measures)


def compare_packing(rounds: int, storage: str) -> Table:
    """3. Packing: tokens that are not padding, trained on in a second by the dp2 x tp2
    mesh; same corpus, 8 rows of 128 a step. Padded rows drop what does not fit.
    """

    def token_rate(run: Callable, pack: bool) -> float:
        answers = run(burst, mesh_training, storage, 2, 2, pack)
        real = sum(real for _, real in answers) / 2  # both ranks of a TP group read it
        return real / max(seconds for seconds, _ in answers)

    with processes(4, threads=1) as ranks:
        measures = {}
        for kind, pack in ("padded", False), ("packed", True):
            config = bench_config(storage, 2, 2, pack=pack)
            lengths = np.load(data.prepare(config) / "lengths.npy")
            padding = 1 - lengths.mean() / config.seq_length
            name = f"{kind} rows, {padding:.1%} padding, {lengths.sum():,} tokens"
            measures[name] = partial(token_rate, ranks, pack)
        alternate(1, measures)  # the first steps are slow
        return "real tokens/s", alternate(rounds, measures)


def prepare(config: TrainConfig, folder: str, workers: int, apart: bool) -> float:
    """Seconds that data.prepare took in this process, if it is one of the workers."""
    own = f"rank{dist.get_rank()}" if apart else "shared"
    config = replace(config, cache_dir=os.path.join(folder, own))
    dist.barrier()
    start = time.perf_counter()
    if dist.get_rank() < workers:
        data.prepare(config)
    return time.perf_counter() - start


def compare_data(rounds: int, storage: str) -> Table:
    """4. Data preparation: data.prepare of ten times the demo corpus, into an empty
    cache; once for the whole run, against once in every worker.
    """
    dataset = f"{storage}/long"
    demo.write_dataset(Path(dataset), train=demo.paragraphs() * 10)

    def seconds(workers: int = 1, apart: bool = False, tokenising: int = 1) -> float:
        settings = {"dataset_name": dataset, "preprocessing_num_workers": tokenising}
        config = bench_config(storage, dp_size=1, tp_size=1, **settings)
        with tempfile.TemporaryDirectory(dir=storage) as folder:
            return max(run(prepare, config, folder, workers, apart))

    with processes(4, threads=1) as run:
        seconds()  # leaves the dataset's Arrow copy in the cache that all rows read
        measures = {
            "once, 1 worker": seconds,
            "once, 4 workers: one works, 3 wait": partial(seconds, workers=4),
            "4 workers, each for itself": partial(seconds, workers=4, apart=True),
            "once, preprocessing_num_workers=4": partial(seconds, tokenising=4),
        }
        return "seconds", alternate(rounds, measures)


def anonymous_memory() -> int:
    """Bytes of this process that no file backs."""
    [line] = [line for line in STATUS.read_text().splitlines() if "RssAnon" in line]
    return int(line.split()[1]) * 1024


@contextmanager
def watched_memory() -> Iterator[Callable[[], int]]:
    """Yields a function: the highest growth so far, sampled every 2 ms."""
    start, done = anonymous_memory(), threading.Event()
    samples = [start]

    def watch() -> None:
        while not done.wait(0.002):
            samples.append(anonymous_memory())

    threading.Thread(target=watch).start()
    try:
        yield lambda: max(*samples, anonymous_memory()) - start
    finally:
        done.set()


def load_whole(storage: str, model_dir: str) -> torch.nn.Module:
    return AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32)


def load_sharded(storage: str, model_dir: str) -> torch.nn.Module:
    config = bench_config(storage, 2, 2, model_name=model_dir)
    return build_engine(config, build_mesh(2, 2)).model


def load_autotp(storage: str, model_dir: str) -> torch.nn.Module:
    from tp2d_lib import autotp

    config = bench_config(storage, 2, 2, model_name=model_dir)
    return autotp.build_engine(config, build_mesh(2, 2)).model


def load(loader: Callable, storage: str, model_dir: str) -> tuple[int, int]:
    """Growth while loading, and until every weight has been written once."""
    loader(storage, f"{storage}/demo/model")  # so that no import is counted
    with watched_memory() as growth:
        model = loader(storage, model_dir)
        loading = growth()
        with torch.no_grad():
            for parameter in model.parameters():
                getattr(parameter, "_local_tensor", parameter).mul_(1)
        return loading, growth()


def compare_memory(rounds: int, storage: str) -> Table:
    """5. Memory: highest growth of a process's anonymous memory while it loads a model
    of 466 MB, fp32. from_pretrained only maps the file; its memory grows when weights
    are written, as the first optimizer step does. At most 3 rounds.
    """
    model_dir = f"{storage}/large"
    size = write_large_model(model_dir)

    def largest(count: int, loader: Callable) -> list[float]:
        # New processes each time: freed memory need not go back to the system.
        with processes(count, threads=1) as run:
            growth = run(load, loader, storage, model_dir)
        return [max(moment) / size for moment in zip(*growth, strict=True)]

    measures = {
        "one process, from_pretrained": partial(largest, 1, load_whole),
        "largest rank of dp2 x tp2, FSDP2": partial(largest, 4, load_sharded),
        "largest rank of dp2 x tp2, AutoTP": partial(largest, 4, load_autotp),
    }
    values = alternate(min(rounds, 3), measures)  # slow to start, and hardly varies
    return "x the whole model", {
        f"{name}{moment}": [both[index] for both in values[name]]
        for index, moment in ((1, ", then written"), (0, ""))
        for name in measures
    }


def write_large_model(directory: str) -> int:
    """Random weights; returns their bytes."""
    sizes = {"vocab_size": 8192, "hidden_size": 768, "intermediate_size": 3072}
    heads = {"num_attention_heads": 12, "num_key_value_heads": 4}
    config = Qwen2Config(num_hidden_layers=12, **sizes, **heads)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model.save_pretrained(directory)
    return sum(parameter.nbytes for parameter in model.parameters())


@cache
def saving_engine(storage: str, in_threads: bool):
    """After a step, so that there is an optimizer state to save."""
    config = bench_config(storage, 2, 2, async_checkpoint=in_threads)
    mesh = build_mesh(2, 2)
    engine = build_engine(config, mesh)
    engine.step(next(iter(data.build_dataloader(config, mesh))))
    return engine


def standstill(storage: str, in_threads: bool) -> float:
    """Milliseconds until training may go on; what is left is not counted."""
    engine = saving_engine(storage, in_threads)
    with tempfile.TemporaryDirectory(dir=storage) as folder:
        dist.barrier()
        start = time.perf_counter()
        written = engine.save(folder)
        seconds = time.perf_counter() - start
        if written:
            written.result()
    return seconds * 1000


def compare_checkpoints(rounds: int, storage: str) -> Table:
    """6. Checkpoints: how long training stands still while FSDP2 saves the demo model
    with its AdamW state, 13 MB in all; dp2 x tp2 mesh of 4 processes x 1 thread.
    """

    def slowest(run: Callable, in_threads: bool) -> float:
        return max(run(standstill, storage, in_threads))

    with processes(4, threads=1) as ranks:
        measures = {
            "at once": partial(slowest, ranks, False),
            "async_checkpoint": partial(slowest, ranks, True),
        }
        alternate(1, measures)
        return "ms", alternate(rounds, measures)


COMPARISONS = {
    "steps": compare_steps,
    "engines": compare_engines,
    "packing": compare_packing,
    "data": compare_data,
    "memory": compare_memory,
    "checkpoints": compare_checkpoints,
}


def main() -> None:
    names = ",".join(COMPARISONS)
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5, help="measurements of a row")
    parser.add_argument("--only", default=names, help=f"some of {names}")
    options = parser.parse_args()
    chosen = options.only.split(",")
    if options.rounds < 1 or not set(chosen) <= set(COMPARISONS):
        parser.error(f"--rounds takes 1 or more, --only takes some of {names}")
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # clean up then, too
    with tempfile.TemporaryDirectory(prefix="tp2d-bench-") as storage:
        os.environ["HF_DATASETS_CACHE"] = f"{storage}/datasets"
        demo.write(f"{storage}/demo")
        print(f"{CORES} cores; median (lowest-highest) of {options.rounds} rounds")
        for name in chosen:
            if name == "memory" and not STATUS.exists():
                print(f"\n5. Memory: skipped, this platform has no {STATUS}")
                continue
            compare = COMPARISONS[name]
            report(compare.__doc__.rstrip(), *compare(options.rounds, storage))


if __name__ == "__main__":
    main()
