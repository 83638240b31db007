"""Which mesh? What a rank holds and sends on each of them, and how fast it is."""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

from tp2d_lib import data
from tp2d_lib.config import ConfigError, TrainConfig
from tp2d_lib.cost import dryrun, times
from tp2d_lib.model import PlanError, build_empty_model
from tp2d_lib.run.metrics import flops_per_token

FULL = 0.9  # of a GPU's memory: the rest is the allocator's reserve, CUDA's and NCCL's


def compare(
    engine: str,
    config: TrainConfig,
    check: Callable[[TrainConfig], TrainConfig] = lambda config: config,
    cluster: times.Cluster | None = None,
    data_rows: Path | None = None,
    price: float | None = None,
) -> tuple[list[dict[str, str]], list[str]]:
    """A row for each mesh of ``config.num_workers`` ranks, and why others are refused.

    "State" is the weights, gradients and optimizer state of a rank, "peak" the most
    that it holds at once, and then what it sends in a step. Each dp rank keeps its
    rows, so a step has fewer of them where tp is larger.

    Args:
        check: that of the engine; without it all meshes are taken to be allowed.
        cluster: to estimate speeds for, and to refuse meshes that do not fit its GPUs.
        data_rows: a folder of ``data.prepare``, to tell the hours that training on it
            takes on the cluster.
        price: of an hour of a GPU, to tell the cost.

    Raises:
        ConfigError, PlanError: the first, if all meshes are refused.
    """
    ranks = config.num_workers
    allowed, steps, refused, errors = {}, {}, [], []
    for tp_size in (n for n in range(1, ranks + 1) if ranks % n == 0):
        mesh = f"tp {tp_size} x dp {ranks // tp_size}"
        try:
            asked = replace(config, tp_size=tp_size, dp_size=ranks // tp_size)
            one = check(asked)
            if data_rows:
                steps[mesh] = data.BatchLoader(one, data_rows, dp_rank=0).steps_left
            allowed[mesh] = one
        except (ConfigError, PlanError) as error:
            refused.append(f"{mesh}: {error}")
            errors.append(error)
    if not allowed:
        raise errors[0]
    # A process for each, forked from one that has imported what all of them need.
    loaded = ["tp2d_lib.cost.dryrun", *["tp2d_lib.fsdp"] * (engine == "fsdp")]
    multiprocessing.set_forkserver_preload(loaded)
    with ThreadPoolExecutor(min(4, os.cpu_count())) as threads:
        predictions = threads.map(
            lambda one: dryrun.predict(engine, one), allowed.values()
        )
        predicted = dict(zip(allowed, predictions, strict=True))
    rows = []
    for mesh, one in allowed.items():
        held = dryrun.peak(predicted[mesh])
        if cluster and held > FULL * cluster.gpu.memory:
            room = dryrun.size(cluster.gpu.memory)
            refused.append(f"{mesh}: it needs {dryrun.size(held)} of a GPU of {room}")
        else:
            cells = row(mesh, one, predicted[mesh])
            if cluster:
                cells |= speed(
                    engine, one, predicted[mesh], cluster, steps.get(mesh), price
                )
            rows.append(cells)
    return rows, refused


def row(mesh, config, predicted) -> dict[str, str]:
    state = sum(predicted[name] for name in dryrun.HELD[:3])
    return {
        "mesh": mesh,
        "rows in a step": f"{config.global_batch_size:,}",
        "state": dryrun.size(state),
        "peak": dryrun.size(dryrun.peak(predicted)),
        "over tp": dryrun.size(predicted["tp"]),
        "over dp": dryrun.size(predicted["dp"]),
    }


def speed(engine, config, predicted, cluster, steps, price) -> dict[str, str]:
    seconds = estimate(engine, config, predicted, cluster)
    tokens = config.global_batch_size * config.seq_length / config.num_workers
    cells = {"step": f"{seconds:#.3g} s", "tokens/s/GPU": f"{tokens / seconds:,.0f}"}
    if steps:
        hours = steps * seconds / 3600
        cells |= {"hours": f"{hours:,.1f}" if hours >= 1 else f"{hours:.2g}"}
        if price:
            cells |= {"cost": f"{hours * config.num_workers * price:,.2f}"}
    return cells


def estimate(engine, config, predicted, cluster: times.Cluster) -> float:
    """Seconds of a step with these bytes; see ``times``."""
    tp_size = config.tp_size
    model = build_empty_model(config)
    flops = flops_per_token(model, config.seq_length) * config.seq_length
    flops *= config.global_batch_size / config.num_workers
    if config.activation_checkpointing == "full":
        flops *= 4 / 3  # forward, a third of it, once more
    # DTensor copies what it gathers; DeepSpeed's stages 0 and 1 hide nothing.
    gathered = predicted["tp"] * tp_size / (tp_size - 1) if tp_size > 1 else 0
    copied = 2 * gathered * (engine == "fsdp")
    hides = engine == "fsdp" or config.zero_stage > 1
    return times.step_seconds(
        cluster,
        tp_size,
        config.dp_size,
        flops,
        predicted["tp"],
        predicted["dp"],
        copied,
        times.EXPOSED if hides else 1.0,
    )


def assumed(cluster: times.Cluster) -> str:
    """What the speeds rest on, in a sentence."""
    gpu, network = cluster.gpu, dryrun.size(cluster.network)
    return (
        f"estimated for {cluster.gpus_per_node} GPUs per node"
        f"{' without a switch' * (not cluster.switched)} at {cluster.use:.0%} of "
        f"{gpu.flops / 1e12:,.0f} TFLOP/s, with {times.LINK:.0%} of their links' "
        f"{dryrun.size(gpu.link)}/s and {times.NETWORK:.0%} of a network's "
        f"{network}/s; the host's time, which decides for small models, is not counted"
    )
