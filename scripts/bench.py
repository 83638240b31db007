"""Speed and memory, side by side: python scripts/bench.py [--rounds N] [--only A,B]

Everything runs on the CPU, offline, on the same cores. A round measures every row once,
the next round in reverse order, and a ratio divides two values of one round: a machine
that slows down slows both. Without --only it times a step at three sizes of a model;
--only all measures the rest as well, which takes much longer.
"""

from __future__ import annotations

import os

# Before anything imports torch or huggingface_hub; processes started here inherit it.
os.environ.update(
    CUDA_VISIBLE_DEVICES="",
    DS_ACCELERATOR="cpu",
    HF_HUB_OFFLINE="1",
    HF_HUB_DISABLE_PROGRESS_BARS="1",  # transformers follows it
    HF_DATASETS_DISABLE_PROGRESS_BARS="1",
)

import argparse
import signal
import sys
import tempfile
from importlib.util import find_spec
from pathlib import Path

# So that `scripts` is found when this file is started by its path; spawn copies it.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from scripts.benchmarks import plot
from scripts.benchmarks.checkpoints import compare_checkpoints
from scripts.benchmarks.growth import (
    compare_corpora,
    compare_lengths,
    compare_ranks,
    compare_vocabularies,
)
from scripts.benchmarks.harness import CORES, report, spread
from scripts.benchmarks.memory import compare_peaks
from scripts.benchmarks.runs import compare_ray
from scripts.benchmarks.sizes import (
    compare_1m,
    compare_26m,
    compare_124m,
    compare_124m_deepspeed,
    compare_124m_others,
)
from scripts.benchmarks.tokens import compare_tokens
from scripts.benchmarks.traffic import compare_traffic
from tp2d_lib.data import demo

COMPARISONS = {
    "tokens": compare_tokens,
    "checkpoints": compare_checkpoints,
    "1M": compare_1m,
    "26M": compare_26m,
    "124M": compare_124m,
    "124M-others": compare_124m_others,
    "124M-deepspeed": compare_124m_deepspeed,
    "ray": compare_ray,
    "peaks": compare_peaks,
    "traffic": compare_traffic,
    "ranks": compare_ranks,
    "lengths": compare_lengths,
    "vocabularies": compare_vocabularies,
    "corpora": compare_corpora,
}
STEPS = "1M,26M,124M,124M-deepspeed"
# What this project wants to reach, relative to one process with all cores.
GOALS = {
    "this project, FSDP2 + DTensor": {"1M": 2.5, "26M": 1.20},
    "this project, AutoTP, ZeRO 1": {"26M": 1.10},
}

PLOT = Path("build/bench.png")
GROWTH = Path("build/growth.png")


def main() -> None:
    names = ",".join(COMPARISONS)
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=3, help="measurements per row")
    known = f"all, or comma-separated: {names}"
    parser.add_argument("--only", default=STEPS, help=known)
    options = parser.parse_args()
    chosen = (names if options.only == "all" else options.only).split(",")
    if options.rounds < 1 or not set(chosen) <= set(COMPARISONS):
        parser.error(f"--rounds must be at least 1, --only any of {names}")
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # clean up then as well
    sizes, growth = {}, {}
    with tempfile.TemporaryDirectory(prefix="tp2d-bench-") as storage:
        demo.write(f"{storage}/demo")
        print(f"{CORES} cores; median (lowest-highest) of {options.rounds} rounds")
        if not find_spec("accelerate"):
            print("left out: transformers' DistributedConfig, for want of accelerate")
        for name in chosen:
            if name == "peaks" and sys.platform != "linux":
                print(f"\nskipped: {name}, for want of /proc/self/status")
                continue
            compare = COMPARISONS[name]
            table = compare(options.rounds, storage)
            rows = report(compare.__doc__.rstrip(), *table)
            if len(table) > 2:
                growth[name] = table
            if name[0].isdigit():  # a size
                sizes.setdefault(name.split("-")[0], {}).update(rows)
    if sizes:
        summarize(sizes)
        plot.draw(sizes, PLOT)
        print(f"\n{PLOT}")
    if growth:
        plot.draw_growth(growth, GROWTH)
        print(f"\n{GROWTH}")


def summarize(sizes: dict[str, dict[str, list[float]]]) -> None:
    """One table of all ways at all sizes, with this project's goals."""
    names = dict.fromkeys(name for rows in sizes.values() for name in rows)
    width = max(map(len, names))
    print("\nA step relative to one process with all cores; in brackets the goal\n")
    print(f"    {'':{width}}" + "".join(f"{size:>26}" for size in sizes))
    for name in names:
        line = f"    {name:{width}}"
        for size, rows in sizes.items():
            goal = GOALS.get(name, {}).get(size)
            shown = spread(rows[name]) if name in rows else ""
            line += f"{shown + (f' [{goal:.2f}]' if goal else ''):>26}"
        print(line)


if __name__ == "__main__":
    main()
