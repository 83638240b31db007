"""Both engines and what else there is, at three sizes of the model."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, partial
from importlib import import_module
from importlib.util import find_spec
from itertools import islice
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, Qwen2Config

from scripts.benchmarks import peers
from scripts.benchmarks.harness import CORES, Table, alternate, processes
from scripts.benchmarks.training import Training, bench_config, same_rows, step_time
from tp2d_lib.config import TrainConfig
from tp2d_lib.mesh import build_mesh

# (settings of a tied Qwen2, rows in a global batch, tokens in a row)
SIZES = {
    "1M": ({}, 8, 128),  # the demo model
    "26M": (
        {
            "vocab_size": 32_768,
            "hidden_size": 384,
            "intermediate_size": 1024,
            "num_hidden_layers": 8,
            "num_attention_heads": 6,
            "num_key_value_heads": 2,
        },
        4,
        512,
    ),
    "124M": (
        {
            "vocab_size": 50_304,
            "hidden_size": 768,
            "intermediate_size": 2048,
            "num_hidden_layers": 12,
            "num_attention_heads": 12,
            "num_key_value_heads": 12,
        },
        4,
        256,
    ),
}


def step_of(name: str, config: TrainConfig) -> Callable:
    module = import_module(f"tp2d_lib.{name}")
    engine = module.build_engine(config, build_mesh(config.dp_size, config.tp_size))
    engine.step.model = engine.model
    return engine.step


fsdp, autotp = partial(step_of, "fsdp"), partial(step_of, "autotp")


PYTORCH = {
    "this project, FSDP2 + DTensor": fsdp,
    "PyTorch's tutorial, FSDP2 + DTensor": peers.plain_pytorch,
    "Ray's template, FSDP2 + DTensor": peers.published_loop,
}
if find_spec("accelerate"):  # make bench installs it
    PYTORCH["transformers, DistributedConfig"] = peers.transformers_distributed
DEEPSPEED = {
    "this project, AutoTP, ZeRO 1": autotp,
    "DeepSpeed's documentation, ZeRO 1": peers.plain_deepspeed,
}


def config_at(storage: str, size: str, dp: int, tp: int, **settings) -> TrainConfig:
    _, rows, tokens = SIZES[size]
    settings |= {"model_name": f"{storage}/{size}", "seq_length": tokens}
    return bench_config(storage, dp, tp, batch_size_per_gpu=rows // dp, **settings)


@cache
def training(storage: str, size: str, build: Callable, dp: int, tp: int) -> Training:
    config = config_at(storage, size, dp, tp)
    return build(config), same_rows(config)


def write_model(storage: str, size: str) -> int:
    """The model of a size with random weights; returns how many."""
    settings, _, _ = SIZES[size]
    source = Path(storage, "demo", "model")
    if settings:
        config = Qwen2Config(tie_word_embeddings=True, **settings)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    else:
        model = AutoModelForCausalLM.from_pretrained(source)
    model.save_pretrained(f"{storage}/{size}")
    return model.num_parameters()


def compare_at(size: str, ways: dict, rounds: int, storage: str) -> Table:
    write_model(storage, size)
    with processes(4, threads=1) as ranks, processes(1, threads=CORES) as one:

        def time(run: Callable, build: Callable, dp: int, tp: int) -> float:
            steps = 5 if size == "1M" else 1  # timed as one
            of = (training, storage, size, build, dp, tp)
            return step_time(run, *of, steps=steps)

        alone = partial(time, one, peers.one_process, 1, 1)
        measures = {f"one process x {CORES} threads": alone}
        for name, build in ways.items():
            measures[name] = partial(time, ranks, build, 2, 2)
        alternate(1, measures)  # the first steps are slow
        return "ms per step", alternate(rounds, measures)


def compare_1m(rounds: int, storage: str) -> Table:
    """Beside others, 1 million parameters: one step on 8 rows of 128 tokens, fp32,
    dp2 x tp2 mesh of 4 processes x 1 thread.
    """
    return compare_at("1M", PYTORCH | DEEPSPEED, rounds, storage)


def compare_26m(rounds: int, storage: str) -> Table:
    """Beside others, 26 million parameters, 32,768 of vocabulary: one step on 4 rows
    of 512 tokens, fp32, the same mesh.
    """
    return compare_at("26M", PYTORCH | DEEPSPEED, rounds, storage)


def compare_124m(rounds: int, storage: str) -> Table:
    """Beside others, 124 million parameters, 50,304 of vocabulary: one step on 4
    rows of 256 tokens, fp32, the same mesh; two at a time, because 24 GB do not hold
    all of them.
    """
    return compare_at("124M", dict(islice(PYTORCH.items(), 2)), rounds, storage)


def compare_124m_others(rounds: int, storage: str) -> Table:
    """The same with Ray's template and transformers."""
    return compare_at("124M", dict(islice(PYTORCH.items(), 2, None)), rounds, storage)


def compare_124m_deepspeed(rounds: int, storage: str) -> Table:
    """The same with DeepSpeed."""
    return compare_at("124M", DEEPSPEED, rounds, storage)
