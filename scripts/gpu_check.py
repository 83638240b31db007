"""Check the engines on the GPUs of this machine: python scripts/gpu_check.py

Or on several: torchrun --nproc_per_node 4 scripts/gpu_check.py. It needs PyTorch and
transformers, and no network; DeepSpeed's engine is checked where that is installed. The
exit code is 1 if a check failed. With --device cpu the same checks run on the CPU.
"""

from __future__ import annotations

import argparse
import os
import shutil
import sys
import tempfile
import warnings
from functools import partial
from pathlib import Path

# So that `scripts` is found when this file is started by its path.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
import torch.distributed as dist
import transformers

from scripts.gpu import cost, files, lessons, training
from scripts.gpu.harness import Report, Run, Skipped, join, write_files
from scripts.gpu.table import as_markdown
from tp2d_lib.config import ConfigError
from tp2d_lib.model import determinism, guards

CHECKS = {
    "lesson: columns, then rows": lessons.by_hand,
    "lesson: rows follow dp_rank": lessons.rows_follow_dp_rank,
    "lesson: the plan": lessons.plan_covers_the_model,
    "lesson: small updates": lessons.small_updates,
    "parity, AdamW": partial(training.parity, optimizer="adamw"),
    "parity, SGD": partial(training.parity, optimizer="sgd"),
    "bfloat16": training.bfloat16,
    "autocast": training.autocast,
    "packed documents": training.documents,
    "packed documents, flex_attention": partial(
        training.documents, attention="flex_attention"
    ),
    "waits": training.waits,
    "activation checkpointing": training.activation_checkpointing,
    "compile": training.compiled,
    "training": training.learns,
    "LoRA": training.adapters,
    "save, load, resume": files.resume,
    "async checkpoint": files.async_checkpoint,
    "export": files.export,
    "memory and traffic": cost.memory_and_traffic,
    "speed": cost.speed,
}
DEEPSPEED = {
    **{
        f"AutoTP, ZeRO {stage}: parity": partial(
            training.parity, optimizer="adamw", engine="autotp", zero_stage=stage
        )
        for stage in range(4)
    },
    "AutoTP: bfloat16": partial(training.bfloat16, engine="autotp"),
    "AutoTP: packed documents": partial(training.documents, engine="autotp"),
    "AutoTP: waits": partial(training.waits, engine="autotp"),
    "AutoTP: save, load, resume": partial(files.resume, engine="autotp"),
    "AutoTP: speed": partial(cost.speed, engine="autotp"),
}


def sizes(world_size: int) -> list[tuple[int, int]]:
    """The meshes of so many ranks, as (tp_size, dp_size)."""
    pairs = [(1, world_size), (world_size, 1)]
    if world_size > 2 and world_size % 2 == 0:
        pairs.append((2, world_size // 2))
    return list(dict.fromkeys(pairs))


def with_deepspeed(check, run: Run) -> str:
    try:
        import tp2d_lib.autotp  # noqa: F401
    except ImportError as error:
        raise Skipped("DeepSpeed is not installed") from error
    return check(run)


def fits(run: Run, report: Report) -> bool:
    """Whether the demo model can be sharded over this mesh; if not, say why."""
    try:
        guards.check_sizes(run.config())
        return True
    except ConfigError as error:
        report.check(run, "all checks", partial(skip, str(error)))
        return False


def skip(why: str, run: Run) -> str:
    raise Skipped(why)


def check_all(place: Path, options: argparse.Namespace) -> Report:
    report = Report()
    shared = (place, options.device, options.deterministic)
    runs = [Run(*mesh, *shared) for mesh in sizes(dist.get_world_size())]
    runs = [run for run in runs if fits(run, report)]
    for run in runs:
        for name, check in CHECKS.items():
            if options.only in name:
                report.check(run, name, check)
    for run in runs[-1:]:  # DeepSpeed keeps its first mesh for good
        for name, check in DEEPSPEED.items():
            if options.only in name:
                report.check(run, name, partial(with_deepspeed, check))
    return report


def read_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument(
        "--deterministic", action="store_true", help="as in a run; resume must be exact"
    )
    parser.add_argument("--only", default="", help="checks with this in their name")
    parser.add_argument("--markdown", metavar="FILE", help="write the table there")
    options = parser.parse_args()
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda must find a GPU; try --device cpu")
    return options


def prepare(options: argparse.Namespace) -> None:
    """What must be settled before anything is computed."""
    if options.device == "cpu":
        os.environ.update(CUDA_VISIBLE_DEVICES="", DS_ACCELERATOR="cpu")
    if options.deterministic:
        determinism.enforce()
    torch.set_float32_matmul_precision("highest")  # some images allow TF32
    warnings.simplefilter("ignore", FutureWarning)
    transformers.logging.disable_progress_bar()
    join(options.device)


def main() -> int:
    options = read_options()
    prepare(options)
    first = dist.get_rank() == 0
    place = [tempfile.mkdtemp(prefix="tp2d-gpu-") if first else None]
    dist.broadcast_object_list(place)
    try:
        if first:
            write_files(Path(place[0]), large=options.device == "cuda")
        dist.barrier()
        report = check_all(Path(place[0]), options)
        dist.barrier()
    finally:
        if first:
            shutil.rmtree(place[0], ignore_errors=True)
    if first:
        table = as_markdown(report, options)
        print(f"\n{table}")
        if options.markdown:
            Path(options.markdown).write_text(f"{table}\n", "utf-8")
    dist.destroy_process_group()
    return 1 if report.failed else 0


if __name__ == "__main__":
    sys.exit(main())
