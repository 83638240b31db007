"""Estimated times against those that others have published."""

import pytest

from tp2d_lib.cost import comm, times
from tp2d_lib.monitor import gpus

# KempnerForge, benchmarks/mfu_scaling/mfu_scaling_2026-04-05.md: nodes of 4 x H200,
# bf16, full recomputation, compiled, 4,096 tokens a row. Its q, k, v, gate and up
# projections each gather their input: 5 + 2 collectives of a layer in forward, 5 + 1
# when they are recomputed, 2 + 5 in backward (benchmarks/profiling/
# 13b_24gpu_profiling.md counts as many), and every rank gathers all logits and computes
# the loss of all: about 24 bytes read and written for each.
# torchtitan, benchmarks/llama3_h100_202412_torchtitan.md (the run on 128 GPUs) and
# asyncTP_llama3_h100_2025-06_torchtitan.md: nodes of 8 x H100 at 500 W, bf16, compiled,
# operators selected for recomputation, 8,192 tokens a row. Attention and MLP gather
# once each: 4 collectives of a layer in forward, 2 when recomputed, 4 in backward.
MODELS = {  # parameters, layers, hidden
    "8B": (8.03e9, 32, 4096),
    "13B": (14.84e9, 40, 5120),
    "70B": (70.55e9, 80, 8192),
}
VOCABULARY = 128_256
H200 = gpus.find("H200")
H100 = gpus.find("H100")._replace(bandwidth=2.4e12)
RUNS = {  # model, rows of a dp rank in a micro-batch, tp, dp, tokens/s of all GPUs
    "H200": [
        ("8B", 2, 1, 2, 18_728),
        ("8B", 4, 2, 1, 13_163),
        ("8B", 4, 1, 4, 38_983),
        ("8B", 4, 2, 2, 25_980),
        ("8B", 4, 4, 1, 25_135),
        ("8B", 4, 4, 2, 44_299),
        ("8B", 4, 4, 4, 82_988),
        ("8B", 4, 4, 8, 155_917),
        ("13B", 4, 1, 8, 35_405),  # not compiled
        ("13B", 4, 4, 2, 27_345),
        ("13B", 4, 4, 4, 53_814),
        ("13B", 4, 4, 8, 104_309),
        ("70B", 2, 4, 8, 17_657),
    ],
    "H100": [
        ("8B", 2, 1, 128, 128 * 6_514),
        ("8B", 12, 8, 8, 64 * 4_378),
    ],
}
# The run on which ``use`` is measured: it decides nothing about meshes.
MEASURED = {"H200": ("8B", 2, 1, 1, 10_471), "H100": ("8B", 2, 1, 8, 8 * 6_667)}


def cluster(name, use=1.0):
    if name == "H200":
        return times.Cluster(H200, gpus_per_node=4, switched=False, use=use)
    return times.Cluster(H100, use=use)


def parts(name, model, rows, tp_size, dp_size):
    """The arguments of ``step_seconds`` for a micro-batch, and its tokens."""
    parameters, layers, hidden = MODELS[model]
    length, collectives, words = (
        (4096, 20, VOCABULARY) if name == "H200" else (8192, 10, 0)
    )
    tokens = rows * length
    values = hidden * (collectives * layers + 3) + words
    full = 2 * values * tokens * (tp_size > 1)
    flops = (6 * parameters + 12 * layers * hidden * length) * tokens / tp_size
    return tokens * dp_size, {
        "tp_size": tp_size,
        "dp_size": dp_size,
        "flops": flops,
        "tp": full * (tp_size - 1) / tp_size,
        "dp": comm.fsdp_bytes(parameters, tp_size, dp_size),
        "copied": 2 * full + 24 * words * tokens * (tp_size - 1) / tp_size,
    }


def estimate(name, *run):
    """Tokens/s of all GPUs, where one GPU computes as fast as in ``MEASURED``."""
    *measured, speed = MEASURED[name]
    tokens, asked = parts(name, *measured)
    compute = asked["flops"] / H200.flops
    rest = times.step_seconds(cluster(name), **asked) - compute
    use = compute / (tokens / speed - rest)
    tokens, asked = parts(name, *run)
    return tokens / times.step_seconds(cluster(name, use), **asked)


@pytest.mark.parametrize("name", RUNS)
def test_published_times_are_met(name):
    errors = {}
    for *run, measured in RUNS[name]:
        errors[tuple(run)] = estimate(name, *run) / measured - 1
    assert max(map(abs, errors.values())) < 0.25, errors


def test_published_meshes_of_four_gpus_are_in_order():
    on_four = [run for run in RUNS["H200"] if run[2] * run[3] == 4]
    assert [run[2:4] for run in on_four] == [(1, 4), (2, 2), (4, 1)]  # fastest first
    speeds = [estimate("H200", *run[:4]) for run in on_four]
    assert speeds == sorted(speeds, reverse=True)


def test_speeds_of_links():
    node = cluster("H200")
    assert node.speed(2) == pytest.approx(0.7 * 150e9)  # a third of the links
    assert node.speed(4) == pytest.approx(0.7 * 450e9)
    assert node.speed(2, apart=4) == node.speed(8) == pytest.approx(0.8 * 50e9)
    assert cluster("H100").speed(2) == pytest.approx(0.7 * 450e9)
