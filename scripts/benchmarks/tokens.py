"""Tokens that are not padding, trained on per second: packed rows and padded ones."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, partial

import numpy as np

from scripts.benchmarks import peers
from scripts.benchmarks.harness import Table, alternate, processes
from scripts.benchmarks.sizes import autotp, fsdp
from scripts.benchmarks.training import Training, bench_config, burst
from tp2d_lib import data
from tp2d_lib.config import TrainConfig
from tp2d_lib.mesh import build_mesh

WAYS = {
    "Ray's template": (peers.published_loop, "none"),
    "FSDP2 + DTensor": (fsdp, "none"),
    "FSDP2 + DTensor, stream": (fsdp, "stream"),
    "FSDP2 + DTensor, documents": (fsdp, "documents"),
    "AutoTP, ZeRO 1, stream": (autotp, "stream"),
    "AutoTP, ZeRO 1, documents": (autotp, "documents"),
}


def config_of(storage: str, pack: str) -> TrainConfig:
    return bench_config(storage, 2, 2, seq_length=512, pack=pack)


@cache
def training(storage: str, build: Callable, pack: str) -> Training:
    config = config_of(storage, pack)
    mesh = build_mesh(config.dp_size, config.tp_size)
    return build(config), iter(data.build_dataloader(config, mesh))


def compare_tokens(rounds: int, storage: str) -> Table:
    """Packing: tokens that are not padding, trained on per second; demo model and
    corpus, 8 rows of 512 tokens in a step, dp2 x tp2 mesh of 4 processes x 1 thread.
    A padded row is one document, cut off after 512 tokens; documents in one row do not
    look into each other, for which attention needs a mask.
    """

    def token_rate(run: Callable, build: Callable, pack: str) -> float:
        answers = run(burst, 2, training, storage, build, pack)
        real = sum(real for _, real in answers) / 2  # both ranks of a TP group read it
        return real / max(seconds for seconds, _ in answers)

    with processes(4, threads=1) as ranks:
        measures = {}
        for way, (build, pack) in WAYS.items():
            config = config_of(storage, pack)
            lengths = np.load(data.prepare(config) / "lengths.npy")
            padding = 1 - lengths.mean() / config.seq_length
            name = f"{way}, {padding:.1%} padding"
            measures[name] = partial(token_rate, ranks, build, pack)
        alternate(1, measures)  # the first steps are slow
        return "real tokens/s", alternate(rounds, measures)
