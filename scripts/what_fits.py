"""Write docs/what-fits.md: which models fit which GPUs, by the dry run.

python scripts/what_fits.py. For each of Qwen2.5's shapes it looks for the smallest
tp_size on which the peak of a rank fits, once for the whole model and once for LoRA.
"""

from __future__ import annotations

import os
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from itertools import product
from pathlib import Path
from typing import NamedTuple

# So that `scripts` is found when this file is started by its path.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
os.environ.setdefault("HF_HUB_OFFLINE", "1")

from scripts.gpu import sizes
from tp2d_lib.config import ConfigError, TrainConfig
from tp2d_lib.cost import dryrun
from tp2d_lib.cost.meshes import FULL
from tp2d_lib.model import guards

PAGE = Path(__file__).resolve().parents[1] / "docs" / "what-fits.md"
MARK = "<!-- what_fits -->\n"


class Machine(NamedTuple):
    """GPUs of one node; ``memory`` of each in bytes."""

    name: str
    gpus: int
    memory: float
    dtype: str = "bfloat16"


MACHINES = (
    Machine("4 x T4", 4, 16e9, "float32"),  # it has no bfloat16
    Machine("4 x L4", 4, 24e9),
    Machine("1 x H200", 1, 141e9),
    Machine("8 x H100", 8, 80e9),
)
WAYS = {"whole": {}, "LoRA": {"lora_rank": 16}}


def fitting(folder: Path, model: str, machine: Machine, way: str) -> str:
    """The smallest tp_size that fits, and what a rank then holds at its peak."""
    for tp_size in (n for n in range(1, machine.gpus + 1) if machine.gpus % n == 0):
        config = TrainConfig(
            model_name=str(folder / model),
            seq_length=2048,
            tp_size=tp_size,
            dp_size=machine.gpus // tp_size,
            device="cuda",
            dtype=machine.dtype,
            activation_checkpointing="full",
            **WAYS[way],
        )
        try:
            guards.check_sizes(config)
        except ConfigError:
            break  # fewer key-value heads than ranks
        peak = dryrun.peak(dryrun.predict("fsdp", config))
        if peak <= FULL * machine.memory:
            return f"tp {tp_size}, {dryrun.size(peak)}"
    return "-"


def main() -> None:
    models = [name for name in sizes.SHAPES if name != "tiny"]
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        for name in models:
            sizes.write_config(name, folder)
        cases = list(product(models, WAYS, MACHINES))
        with ThreadPoolExecutor(os.cpu_count()) as threads:
            ask = lambda case: fitting(folder, case[0], case[2], case[1])  # noqa: E731
            cells = dict(zip(cases, threads.map(ask, cases), strict=True))
    lines = [["model", "trained", *(machine.name for machine in MACHINES)]]
    lines.append(["---"] * len(lines[0]))
    for model, way in product(models, WAYS):
        found = [cells[model, way, machine] for machine in MACHINES]
        lines.append([model.upper(), way, *found])
    table = "".join(f"| {' | '.join(line)} |\n" for line in lines)
    PAGE.write_text(PAGE.read_text().partition(MARK)[0] + MARK + table)


if __name__ == "__main__":
    main()
