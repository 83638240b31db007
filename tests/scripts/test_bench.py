"""The benchmark starts, and every row of a comparison can be measured."""

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

BENCH = Path(__file__).resolve().parents[2] / "scripts" / "bench.py"


def bench(*options):
    environment = os.environ | {"PYTHONWARNINGS": "ignore"}
    return subprocess.run(
        [sys.executable, BENCH, *options],
        env=environment,
        capture_output=True,
        text=True,
    )


def test_comparisons_are_named():
    done = bench("--only", "nothing")
    assert done.returncode == 2
    assert (
        "tokens,checkpoints,1M,26M,124M,124M-others,124M-deepspeed,ray,peaks,traffic,"
        "ranks,lengths,vocabularies,corpora" in done.stderr
    )


@pytest.mark.ranks
@pytest.mark.faults
def test_all_others_train():
    done = bench("--only", "1M", "--rounds", "1")
    assert done.returncode == 0, done.stderr
    rows = [line for line in done.stdout.splitlines() if line.startswith("    ")]
    ways = 6 + bool(find_spec("accelerate"))
    # The text's end, a head, a row each; in the summary a head, a row for all but one.
    assert len(rows) == 1 + 1 + ways + 1 + ways - 1, done.stdout
    goals = [line for line in rows if line.endswith("]")]
    assert [line.split("  ")[2] for line in goals] == ["this project, FSDP2 + DTensor"]
