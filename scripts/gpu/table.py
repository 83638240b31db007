"""The table of a run, to be pasted into docs/gpu.md."""

from __future__ import annotations

import argparse
import platform
import shlex
import shutil
import subprocess
import sys
import time

import torch
import torch.distributed as dist
import transformers

from scripts.gpu.harness import Report


def as_markdown(report: Report, options: argparse.Namespace) -> str:
    """The machine and every check, as two Markdown tables."""
    machine = [("date", time.strftime("%Y-%m-%d")), *hardware(options.device)]
    machine.append(("command", f"`{command()}`"))
    lines = ["| | |", "| --- | --- |", *map(line, machine), ""]
    lines += ["| mesh | check | result | figures |", "| --- | --- | --- | --- |"]
    return "\n".join([*lines, *map(line, report.rows)])


def line(cells: tuple[str, ...]) -> str:
    return f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |"


def hardware(device: str) -> list[tuple[str, str]]:
    versions = {
        "PyTorch": torch.__version__,
        "transformers": transformers.__version__,
        "Python": platform.python_version(),
    }
    if device == "cpu":
        found = [("ranks", f"{dist.get_world_size()} on a CPU")]
    else:
        name = torch.cuda.get_device_name()
        found = [("GPUs", f"{dist.get_world_size()} x {name}"), ("driver", driver())]
        nccl = ".".join(map(str, torch.cuda.nccl.version()))
        versions |= {"CUDA": str(torch.version.cuda), "NCCL": nccl}
    told = ", ".join(f"{name} {version}" for name, version in versions.items())
    return [*found, ("versions", told)]


def driver() -> str:
    if not shutil.which("nvidia-smi"):
        return "unknown, because there is no nvidia-smi"
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    told = subprocess.run(query, capture_output=True, text=True).stdout.split()
    return told[0] if told else "unknown"


def command() -> str:
    """How to run the same again."""
    ranks = dist.get_world_size()
    start = f"torchrun --nproc_per_node {ranks}" if ranks > 1 else "python"
    return shlex.join([*start.split(), "scripts/gpu_check.py", *sys.argv[1:]])
