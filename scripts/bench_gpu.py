"""Speed and memory at real sizes on GPUs: python scripts/bench_gpu.py --models 0.5b

Random weights of Qwen2.5's shapes and random tokens, in bfloat16; without Ray, network
or files. Every model is trained by every engine with every option, on one GPU, or with
torchrun on all with tp 1. "minimal" is a short loop by hand. With --device cpu and
--models tiny it runs without a GPU.
"""

from __future__ import annotations

import argparse
import gc
import itertools
import os
import sys
import tempfile
import time
import warnings
from collections.abc import Iterator
from pathlib import Path

# So that `scripts` is found when this file is started by its path.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
import torch.distributed as dist

from scripts.gpu import sizes
from scripts.gpu.harness import Run, join
from scripts.gpu.table import hardware, line
from tp2d_lib.config import first_line
from tp2d_lib.cost import dryrun
from tp2d_lib.model import build_empty_model
from tp2d_lib.run import gpus, metrics

OPTIONS = {
    "eager": {},
    "compiled": {"compile": True},
    "selective": {"activation_checkpointing": "selective"},
    "checkpointing": {"activation_checkpointing": "full"},
    "both": {"compile": True, "activation_checkpointing": "full"},
    "kept": {"compile": True, "reshard_after_forward": False},
    "some": {"compile": True, "activation_checkpointing": "selective"},
    "mask": {"attn_implementation": "sdpa"},
    "flex": {"attn_implementation": "flex_attention"},
}
TITLES = (
    "model",
    "rows x tokens",
    "engine",
    "options",
    "tokens/s",
    "MFU",
    "peak memory",
    "predicted",
)


def read_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    for name, default, known in (
        ("--models", ["0.5b"], sizes.SHAPES),
        ("--engines", ["minimal", "fsdp"], ("minimal", "fsdp", "autotp")),
        ("--options", ["eager"], OPTIONS),
    ):
        parser.add_argument(name, nargs="+", choices=list(known), default=default)
    parser.add_argument("--rows", type=int, default=4, help="on each GPU")
    parser.add_argument("--seq_length", type=int, default=2048)
    parser.add_argument(
        "--documents", type=int, metavar="N", help="pack documents of about N tokens"
    )
    parser.add_argument("--seconds", type=float, default=3.0, help="to measure a case")
    parser.add_argument("--no_prediction", action="store_true")
    parser.add_argument("--profile", metavar="FILE", help="write the last case's steps")
    return parser.parse_args()


def batches(run: Run, config, count: int, documents=None) -> Iterator[list[dict]]:
    """Random rows, other ones on every dp rank, of documents of about that length."""
    source = torch.Generator().manual_seed(run.mesh["dp"].get_local_rank())
    vocabulary = build_empty_model(config).config.vocab_size
    shape = (config.batch_size_per_gpu, config.seq_length)
    for _ in range(count):
        ids = torch.randint(vocabulary, shape, generator=source)
        micro = {"input_ids": ids, "labels": ids}
        if documents:
            starts = torch.rand(shape, generator=source) < 1 / documents
            starts[:, 0] = True
            place = torch.arange(shape[1])
            micro["position_ids"] = place - (place * starts).cummax(1).values
        yield [micro]


def measure(step, batch: list[dict], seconds: float) -> float:
    """Seconds per step."""
    for _ in range(3):
        loss, _ = step(batch)
    loss.item()  # waits for the device
    count, start = 0, time.perf_counter()
    while count < 3 or time.perf_counter() - start < seconds:
        loss, _ = step(batch)
        loss.item()
        count += 1
    return (time.perf_counter() - start) / count


def case(run: Run, engine: str, config, options: argparse.Namespace) -> list[str]:
    """Tokens per second, MFU, peak memory and what the dry run predicts."""
    device = torch.device(run.device)
    predicted = "-"
    if engine != "minimal" and not options.no_prediction:
        held = dryrun.predict(engine, config)
        predicted = dryrun.size(dryrun.peak(held))
    step = sizes.build(engine, config, run.mesh)
    [batch] = batches(run, config, 1, options.documents)
    took = measure(step, batch, options.seconds)
    if options.profile:
        profile(step, batch, options)
    tokens = config.batch_size_per_gpu * config.seq_length / took  # of this GPU
    flops = metrics.flops_per_token(build_empty_model(config), config.seq_length)
    peak = gpus.peak_flops(device)
    mfu = f"{tokens * flops / peak:.1%}" if peak else "-"
    memory = dryrun.size(metrics.peak_memory(device))
    return [f"{tokens:,.0f}", mfu, memory, predicted]


def profile(step, batch: list[dict], options: argparse.Namespace) -> None:
    with torch.profiler.profile() as recorded:
        for _ in range(3):
            step(batch)[0].item()
    by = "self_cuda_time_total" if options.device == "cuda" else "self_cpu_time_total"
    averages = recorded.key_averages()
    with Path(options.profile).open("a") as file:
        file.write(averages.table(sort_by=by, row_limit=40))
        file.write(averages.table(sort_by="self_cpu_time_total", row_limit=40))


def main() -> None:
    options = read_options()
    if options.device == "cpu":
        os.environ.update(CUDA_VISIBLE_DEVICES="", DS_ACCELERATOR="cpu")
    warnings.simplefilter("ignore")
    join(options.device)
    first = dist.get_rank() == 0
    say = print if first else lambda *_, **__: None
    for name, value in hardware(options.device):
        say(f"{name}: {value}")
    say(f"\n{line(TITLES)}\n{line(('---',) * len(TITLES))}", flush=True)
    with tempfile.TemporaryDirectory(prefix="tp2d-gpu-") as folder:
        run = Run(1, dist.get_world_size(), Path(folder), options.device, False)
        for name, engine, chosen in itertools.product(
            options.models, options.engines, options.options
        ):
            config = run.config(
                model_name=str(sizes.write_config(name, Path(folder))),
                seq_length=options.seq_length,
                batch_size_per_gpu=options.rows,
                dtype="auto",
                pack="documents" if options.documents else "stream",
                **OPTIONS[chosen],
            )
            try:
                figures = case(run, engine, config, options)
            except torch.OutOfMemoryError as error:
                figures = ["does not fit", "", "", first_line(error)[:40]]
            shape = f"{options.rows} x {options.seq_length}"
            say(line((name, shape, engine, chosen, *figures)), flush=True)
            gc.collect()  # engines refer to themselves
            if options.device == "cuda":
                torch.cuda.empty_cache()
                torch.cuda.reset_peak_memory_stats()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
