"""Checks of what a step holds, sends and takes, on the largest model for the device."""

from __future__ import annotations

import time

import torch
import torch.distributed as dist

from scripts.gpu.harness import Failed, Run
from tp2d_lib.config import TrainConfig
from tp2d_lib.cost import comm, dryrun, memory
from tp2d_lib.model import build_empty_model
from tp2d_lib.run import gpus, metrics

TIMED = 10  # steps, after three that warm up
CLOSE = 0.15  # allowed relative error of activations and traffic
PEAK = (0.85, 1.15)  # of the dry run's peak: the GPU's kernels have workspaces


def memory_and_traffic(run: Run) -> str:
    """A rank holds and sends what the dry run predicts for it."""
    config = run.large()
    predicted = [dryrun.predict("fsdp", config) if dist.get_rank() == 0 else None]
    dist.broadcast_object_list(predicted)
    [predicted] = predicted
    held, close, peak = measure(run, config)
    if dist.get_rank() > 0:
        return ""  # predicted is the largest share, which rank 0 holds
    good = all(held[name] == predicted[name] for name in held)
    good &= all(abs(close[k] - predicted[k]) <= CLOSE * predicted[k] for k in close)
    text = [
        ratio(name, count, predicted[name]) for name, count in (held | close).items()
    ]
    if peak is not None:
        total = dryrun.peak(predicted)
        good &= PEAK[0] * total <= peak <= PEAK[1] * total
        text.append(f"peak {peak / total:.2f} ({dryrun.size(peak)})")
    told = f"of the prediction: {', '.join(text)}"
    if not good:
        raise Failed(told)
    return told


def measure(run: Run, config: TrainConfig) -> tuple[dict, dict, int | None]:
    """Bytes predicted exactly, bytes predicted closely, and on a GPU a step's peak."""
    on_gpu = run.device == "cuda"
    before = torch.cuda.memory_allocated() if on_gpu else 0
    first, second, third = run.batches(config, 3)
    with memory.LiveBytes() as live:
        engine = run.build(config)
        live.model = engine.model
        held = memory.fsdp_rank_bytes(engine, first)
    with comm.CommBytes(run.mesh) as sent:
        engine.step(second)
    close = {"tp": sent.sent("tp"), "dp": sent.sent("dp")}
    close["activations"] = live.activations
    if not on_gpu:
        return held, close, None
    torch.cuda.reset_peak_memory_stats()  # counting needs memory of its own
    engine.step(third)
    return held, close, torch.cuda.max_memory_allocated() - before


def ratio(name: str, count: int, predicted: int) -> str:
    if predicted:
        return f"{name} {count / predicted:.3f}"
    return f"{name} {count} B instead of none" if count else f"{name} none"


def speed(run: Run, engine: str = "fsdp") -> str:
    """Tokens per second, MFU and the peak of memory; there is nothing to compare."""
    config = run.large()
    built = run.build(config, engine)
    batches = run.batches(config, 3 + TIMED)
    for batch in batches[:3]:
        loss, _ = built.step(batch)
    loss.item()  # waits for the device
    dist.barrier()
    start = time.perf_counter()
    for batch in batches[3:]:
        loss, _ = built.step(batch)
    loss.item()
    seconds = time.perf_counter() - start
    tokens = TIMED * config.global_batch_size * config.seq_length / seconds
    peak = gpus.peak_flops(built.device)
    mfu = "unknown, as is the peak of this device"
    if peak:
        full = build_empty_model(config)
        flops = metrics.flops_per_token(full, config.seq_length) * tokens
        mfu = f"{flops / peak / dist.get_world_size():.1%}"
    held = dryrun.size(metrics.peak_memory(built.device))
    return f"{tokens:,.0f} tokens/s, MFU {mfu}, peak memory {held}"
