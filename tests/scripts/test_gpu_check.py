"""What checks and measures on GPUs, on a CPU: what it prints, what it can lack."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from scripts import gpu_check

ROOT = Path(__file__).resolve().parents[2]
ALONE = """
import sys

for name in ("ray", "datasets", "pyarrow", "deepspeed", "mlflow"):
    sys.modules[name] = None  # as if it were not installed
from scripts import gpu_check
from scripts.gpu import training

training.WEIGHTS["sgd"] *= float(sys.argv.pop(1))
sys.exit(gpu_check.main())
"""
TEXT = {"capture_output": True, "text": True, "timeout": 900}


def run(*command: str) -> tuple[int, dict[str, list[str]], str]:
    """The exit code, the checks by outcome, and what else was printed."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    ended = subprocess.run(
        [sys.executable, *command], cwd=ROOT, env=environment, **TEXT
    )
    lines = re.findall(
        r"^(ok|FAILED|skipped)\W+tp \d x dp \d +(.*)$", ended.stdout, re.M
    )
    outcomes = {kind: [] for kind in ("ok", "FAILED", "skipped")}
    for kind, line in lines:
        outcomes[kind].append(line)
    return ended.returncode, outcomes, ended.stdout + ended.stderr


@pytest.mark.ranks
def test_a_check_that_fails_is_told(tmp_path):
    """Without Ray, datasets and DeepSpeed, which a GPU machine may lack."""
    table = tmp_path / "table.md"
    flags = ["--device", "cpu", "--only", "parity", "--markdown", str(table)]
    code, outcomes, output = run("-c", ALONE, "-1", *flags)
    assert code == 1, output
    [good], [bad] = outcomes["ok"], outcomes["FAILED"]
    assert good.startswith("parity, AdamW")
    assert re.match(r"parity, SGD .* weights \S+ \(at most -1e-03\)", bad)
    assert len(outcomes["skipped"]) == 4
    assert all("DeepSpeed is not installed" in why for why in outcomes["skipped"])
    rows = table.read_text()
    assert re.search(r"^\| versions \| PyTorch \S+, transformers ", rows, re.M)
    assert re.search(r"^\| tp 1 x dp 1 \| parity, SGD \| FAILED \| losses", rows, re.M)
    assert rows in output


@pytest.mark.ranks
@pytest.mark.faults
def test_every_check_without_ray_or_deepspeed():
    code, outcomes, output = run("-c", ALONE, "1", "--device", "cpu", "--deterministic")
    assert code == 0, output
    assert len(outcomes["ok"]) == len(gpu_check.CHECKS), output
    assert len(outcomes["skipped"]) == len(gpu_check.DEEPSPEED)


@pytest.mark.ranks
@pytest.mark.faults
def test_every_check_on_two_ranks():
    torchrun = ["-m", "torch.distributed.run", "--nproc_per_node", "2"]
    code, outcomes, output = run(*torchrun, "scripts/gpu_check.py", "--device", "cpu")
    assert code == 0, output
    checks = 2 * len(gpu_check.CHECKS) + len(gpu_check.DEEPSPEED)
    assert len(outcomes["ok"]) == checks, output


@pytest.mark.ranks
def test_the_benchmark_runs_without_a_gpu():
    """Every engine with every option that needs no compiler."""
    small = ["--device", "cpu", "--models", "tiny", "--rows", "1", "--seq_length", "64"]
    engines = ["--engines", "minimal", "fsdp", "autotp", "--seconds", "0"]
    options = ["--options", "eager", "checkpointing", "--no_prediction"]
    command = [sys.executable, "scripts/bench_gpu.py", *small, *engines, *options]
    ended = subprocess.run(command, cwd=ROOT, **TEXT)
    rows = re.findall(
        r"^\| tiny \| 1 x 64 \| (\w+) \| (\w+) \| [\d,]+ \| - \| \d+ MB \|",
        ended.stdout,
        re.M,
    )
    assert len(set(rows)) == 6, ended.stdout + ended.stderr


def test_meshes_of_so_many_ranks():
    assert gpu_check.sizes(1) == [(1, 1)]
    assert gpu_check.sizes(2) == [(1, 2), (2, 1)]
    assert gpu_check.sizes(4) == [(1, 4), (4, 1), (2, 2)]
    assert gpu_check.sizes(3) == [(1, 3), (3, 1)]
