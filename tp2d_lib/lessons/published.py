"""Speeds that others have published, and what ``cost.times`` estimates for them.

The runs are KempnerForge's, benchmarks/mfu_scaling/mfu_scaling_2026-04-05.md, on nodes
of 4 x H200, and torchtitan's, benchmarks/llama3_h100_202412_torchtitan.md (128 GPUs)
and asyncTP_llama3_h100_2025-06_torchtitan.md (64), on nodes of 8 x H100 limited to
500 W. All compute in bfloat16, and all but the one of 13B on tp 1 are compiled.
"""

from __future__ import annotations

from dataclasses import replace
from typing import NamedTuple

from tp2d_lib.cost import comm, times
from tp2d_lib.run import gpus

MODELS = {  # parameters, layers, hidden
    "8B": (8.03e9, 32, 4096),
    "13B": (14.84e9, 40, 5120),
    "70B": (70.55e9, 80, 8192),
}
VOCABULARY = 128_256


class Run(NamedTuple):
    """A published run: ``rows`` of a micro-batch, ``speed`` in tokens/s per GPU."""

    gpu: str
    model: str
    rows: int
    tp_size: int
    dp_size: int
    speed: float


class Traffic(NamedTuple):
    """What a plan sends over tp: collectives of a layer, and words gathered per token.

    KempnerForge recomputes everything, and its q, k, v, gate and up projections each
    gather their input: 5 + 2 collectives in forward, 5 + 1 when they are recomputed,
    2 + 5 in backward; its benchmarks/profiling/13b_24gpu_profiling.md counts as many.
    It gathers all logits, and every rank computes the loss of all. In torchtitan
    attention and MLP gather once each: 4 in forward, 2 when recomputed, 4 in backward.
    """

    length: int  # tokens of a row
    collectives: int
    words: int


PLANS = {"H200": Traffic(4096, 20, VOCABULARY), "H100": Traffic(8192, 10, 0)}
CLUSTERS = {
    "H200": times.Cluster(gpus.GPUS["H200"], gpus_per_node=4, switched=False),
    "H100": times.Cluster(gpus.GPUS["H100"]._replace(bandwidth=2.4e12)),
}
# They tell how much of its peak a GPU of each cluster computes with, not which mesh is
# fast: nothing is sent over tp.
MEASURED = [Run("H200", "8B", 2, 1, 1, 10_471), Run("H100", "8B", 2, 1, 8, 6_667)]
RUNS = [
    Run("H200", "8B", 4, 1, 4, 38_983 / 4),
    Run("H200", "8B", 4, 2, 2, 25_980 / 4),
    Run("H200", "8B", 4, 4, 1, 25_135 / 4),
    Run("H200", "8B", 2, 1, 2, 18_728 / 2),
    Run("H200", "8B", 4, 2, 1, 13_163 / 2),
    Run("H200", "8B", 4, 4, 2, 44_299 / 8),
    Run("H200", "8B", 4, 4, 4, 82_988 / 16),
    Run("H200", "8B", 4, 4, 8, 155_917 / 32),
    Run("H200", "13B", 4, 1, 8, 35_405 / 8),
    Run("H200", "13B", 4, 4, 2, 27_345 / 8),
    Run("H200", "13B", 4, 4, 4, 53_814 / 16),
    Run("H200", "13B", 4, 4, 8, 104_309 / 32),
    Run("H200", "70B", 2, 4, 8, 17_657 / 32),
    Run("H100", "8B", 12, 8, 8, 4_378),
    Run("H100", "8B", 2, 1, 128, 6_514),
]


def estimate(run: Run) -> float:
    """Tokens/s per GPU, where a GPU computes as fast as in ``MEASURED``."""
    [measured] = [one for one in MEASURED if one.gpu == run.gpu]
    own = replace(CLUSTERS[run.gpu], use=1.0)
    asked = parts(measured)
    compute = asked["flops"] / own.gpu.flops
    rest = times.step_seconds(own, **asked) - compute
    use = compute / (tokens(measured) / measured.speed - rest)
    return tokens(run) / times.step_seconds(replace(own, use=use), **parts(run))


def tokens(run: Run) -> float:
    """Tokens of a micro-batch per GPU."""
    return run.rows * PLANS[run.gpu].length / run.tp_size


def parts(run: Run) -> dict[str, float]:
    """The arguments of ``times.step_seconds`` for a micro-batch."""
    parameters, layers, hidden = MODELS[run.model]
    length, collectives, words = PLANS[run.gpu]
    tp_size, in_group = run.tp_size, run.rows * length
    ring = (tp_size - 1) / tp_size
    values = hidden * (collectives * layers + 3) + words  # 3: embedding and head
    gathered = 2 * values * in_group * (tp_size > 1)
    loss = 24 * words * in_group * ring  # bytes, for the logits of other ranks
    return {
        "tp_size": tp_size,
        "dp_size": run.dp_size,
        "flops": (6 * parameters + 12 * layers * hidden * length) * tokens(run),
        "tp": gathered * ring,
        "dp": comm.fsdp_bytes(parameters, tp_size, run.dp_size),
        "copied": 2 * gathered + loss,
    }


def compare(runs: list[Run]) -> list[dict[str, str]]:
    """Published and estimated speeds, as rows for ``notebook.table``."""
    return [
        {
            "GPUs": f"{run.tp_size * run.dp_size} {run.gpu}",
            "model": run.model,
            "mesh": f"tp {run.tp_size} x dp {run.dp_size}",
            "published": f"{run.speed:,.0f}",
            "estimated": f"{estimate(run):,.0f}",
            "difference": f"{round(estimate(run) / run.speed - 1, 2) + 0:+.0%}",
        }
        for run in runs
    ]
