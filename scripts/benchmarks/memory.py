"""Memory of a process while it loads a model, full or sharded, and while it trains."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial

import torch
from transformers import AutoModelForCausalLM, Qwen2Config

from scripts.benchmarks import peers
from scripts.benchmarks.harness import CORES, Table, alternate, processes
from scripts.benchmarks.sizes import DEEPSPEED, PYTORCH, training, write_model
from scripts.benchmarks.training import bench_config
from tp2d_lib.fsdp import build_engine
from tp2d_lib.mesh import build_mesh
from tp2d_lib.run.metrics import resident_bytes

anonymous_memory = partial(resident_bytes, "RssAnon")


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


def write_large_model(directory: str) -> int:
    """Random weights; returns their bytes."""
    sizes = {"vocab_size": 8192, "hidden_size": 768, "intermediate_size": 3072}
    heads = {"num_attention_heads": 12, "num_key_value_heads": 4}
    config = Qwen2Config(num_hidden_layers=12, **sizes, **heads)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model.save_pretrained(directory)
    return sum(parameter.nbytes for parameter in model.parameters())


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
    return "x the full model", {
        f"{name}{moment}": [both[index] for both in values[name]]
        for index, moment in ((1, ", then written"), (0, ""))
        for name in measures
    }


def grow(storage: str, build: Callable, dp_size: int, tp_size: int) -> int:
    """Bytes by which a process grows while it loads the model and takes two steps."""
    for size in ("1M", "26M"):  # first a small one, so that no import is counted
        with watched_memory() as growth:
            step, batches = training(storage, size, build, dp_size, tp_size)
            for _, batch in zip(range(2), batches, strict=False):
                step(batch)
            most = growth()
    return most


def compare_peaks(rounds: int, storage: str) -> Table:
    """12. Peak memory: highest growth of any process's anonymous memory, from before it
    loads the model of 26 million parameters to the end of its second step; 4 rows of
    512 tokens, dp2 x tp2 mesh of 4 processes x 1 thread. At most 3 rounds.
    """

    def largest(build: Callable, dp_size: int, tp_size: int) -> float:
        # New processes each time: freed memory need not go back to the system.
        count = dp_size * tp_size
        with processes(count, threads=CORES // count or 1) as run:
            return max(run(grow, storage, build, dp_size, tp_size)) / 1e6

    for size in ("1M", "26M"):
        write_model(storage, size)
    measures = {"one process": partial(largest, peers.one_process, 1, 1)}
    for name, build in (PYTORCH | DEEPSPEED).items():
        measures[name] = partial(largest, build, 2, 2)
    return "MB", alternate(min(rounds, 3), measures)
