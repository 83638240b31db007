"""How time grows with ranks, tokens, vocabulary and documents, beside the theory."""

from __future__ import annotations

import tempfile
import time
from dataclasses import replace
from functools import cache, partial
from pathlib import Path

from transformers import AutoModelForCausalLM, Qwen2Config

from scripts.benchmarks.harness import CORES, Table, alternate, processes
from scripts.benchmarks.sizes import fsdp
from scripts.benchmarks.training import Training, bench_config, same_rows, step_time
from tp2d_lib import data
from tp2d_lib.config import TrainConfig
from tp2d_lib.data import demo
from tp2d_lib.model import build_empty_model
from tp2d_lib.run.metrics import flops_per_token

MESHES = ((1, 1), (2, 1), (1, 2), (2, 2), (4, 2))  # (dp_size, tp_size)
LENGTHS = (128, 512, 2048)
VOCABULARIES = (2048, 8192, 32_768, 151_936)
CORPORA = (1, 10, 100)  # times the demo corpus
ROWS, TOKENS, WORDS = 8, 128, 8192  # where they do not grow


def write_model(storage: str, vocabulary: int) -> str:
    """A tied Qwen2 with 5 million weights beside its embedding."""
    folder = f"{storage}/growth-{vocabulary}"
    config = Qwen2Config(
        vocab_size=vocabulary,
        hidden_size=256,
        intermediate_size=768,
        num_hidden_layers=6,
        num_attention_heads=8,
        num_key_value_heads=8,
        tie_word_embeddings=True,
    )
    if not Path(folder).exists():
        AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    return folder


def config_of(
    storage: str, mesh: tuple, rows=ROWS, tokens=TOKENS, words=WORDS
) -> TrainConfig:
    settings = {"model_name": write_model(storage, words), "seq_length": tokens}
    return bench_config(storage, *mesh, batch_size_per_gpu=rows // mesh[0], **settings)


@cache
def training(config: TrainConfig) -> Training:
    return fsdp(config), same_rows(config)


def flops(config: TrainConfig) -> float:
    tokens = config.global_batch_size * config.seq_length
    return tokens * flops_per_token(build_empty_model(config), config.seq_length)


def compare_ranks(rounds: int, storage: str) -> Table:
    """More ranks for the same 8 rows of 128 tokens, one thread each, 7 million
    parameters. In theory, as many times faster as there are cores for ranks.
    """
    values, theory = {}, []
    for mesh in MESHES:
        count = mesh[0] * mesh[1]
        config = config_of(storage, mesh)
        with processes(count, threads=1) as ranks:
            measure = partial(step_time, ranks, training, config)
            measure()  # the first steps are slow
            values |= alternate(rounds, {f"dp{mesh[0]} x tp{mesh[1]}": measure})
        theory.append(1 / min(count, CORES))
    return "ms per step", values, theory


def compare_configs(rounds: int, configs: dict[str, TrainConfig]) -> Table:
    """Steps of FSDP2 on dp2 x tp2; in theory as their floating-point operations."""
    theory = [flops(config) for config in configs.values()]
    with processes(4, threads=1) as ranks:
        measures = {
            name: partial(step_time, ranks, training, config, steps=2)
            for name, config in configs.items()
        }
        alternate(1, measures)  # the first steps are slow
        values = alternate(rounds, measures)
    return "ms per step", values, [each / theory[0] for each in theory]


def compare_lengths(rounds: int, storage: str) -> Table:
    """Longer rows: 4 rows of so many tokens, 7 million parameters, dp2 x tp2. In
    theory as the floating-point operations: attention's grow with the square.
    """
    of = partial(config_of, storage, (2, 2), 4)
    return compare_configs(rounds, {f"{n:,} tokens": of(n) for n in LENGTHS})


def compare_vocabularies(rounds: int, storage: str) -> Table:
    """A larger vocabulary: 4 rows of 128 tokens, 5 million parameters beside the
    tied embedding, dp2 x tp2. In theory as the floating-point operations.
    """
    of = partial(config_of, storage, (2, 2), 4, TOKENS)
    return compare_configs(rounds, {f"{n:,} words": of(n) for n in VOCABULARIES})


def prepare(storage: str, times: int) -> float:
    """Seconds to tokenize and pack, in a process of its own so that nothing is kept."""
    config = bench_config(storage, 1, 1, dataset_name=f"{storage}/corpus-{times}")
    with tempfile.TemporaryDirectory(dir=storage) as folder:
        start = time.perf_counter()
        data.prepare(replace(config, cache_dir=folder))
        return time.perf_counter() - start


def compare_corpora(rounds: int, storage: str) -> Table:
    """A larger corpus: data.prepare of so many times the demo corpus.
    In theory so many times as long.
    """
    for times in CORPORA:
        folder = Path(f"{storage}/corpus-{times}")
        demo.write_dataset(folder, train=demo.paragraphs() * times)
    with processes(1, threads=1) as run:
        measures = {
            f"{times} x": lambda times=times: run(prepare, storage, times)[0]
            for times in CORPORA
        }
        alternate(1, measures)
        return "seconds", alternate(rounds, measures), [float(n) for n in CORPORA]
