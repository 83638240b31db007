"""Write scripts/site/meshes.json: what the planner says about many meshes.

python scripts/which_mesh.py, for half an hour. The page "Which mesh?" of the site shows
it: for each model, length and number of GPUs a row per mesh, by the dry run, and what
a step takes on each kind of GPU, by the planner's estimate.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from itertools import product
from pathlib import Path

# So that `scripts` is found when this file is started by its path.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
os.environ.setdefault("HF_HUB_OFFLINE", "1")

from scripts.gpu import sizes
from tp2d_lib.config import ConfigError, TrainConfig
from tp2d_lib.cost import dryrun, meshes, times
from tp2d_lib.model import guards
from tp2d_lib.run import gpus

FILE = Path(__file__).resolve().parent / "site" / "meshes.json"
MODELS = ("0.5b", "1.5b", "3b", "7b", "14b")
KINDS = ("L4", "A100", "H100", "H200", "B200")
RANKS = (1, 2, 4, 8, 16, 32, 64)
LENGTHS = (2048, 8192, 32_768)


def rows(folder: Path, model: str, length: int, ranks: int) -> list[list]:
    """For each mesh tp_size, bytes of the peak, over tp and over dp, and seconds."""
    found = []
    for tp_size in (n for n in (1, 2, 4, 8) if n <= ranks):
        config = TrainConfig(
            model_name=str(folder / model),
            seq_length=length,
            tp_size=tp_size,
            dp_size=ranks // tp_size,
            device="cuda",
            dtype="bfloat16",
            activation_checkpointing="full",
        )
        try:
            guards.check_sizes(config)
        except ConfigError:
            break  # fewer key-value heads than ranks
        predicted = dryrun.predict("fsdp", config)
        held = dryrun.peak(predicted), predicted["tp"], predicted["dp"]
        clusters = [times.Cluster(gpus.find(kind)) for kind in KINDS]
        seconds = [meshes.estimate("fsdp", config, predicted, c) for c in clusters]
        found.append([tp_size, *map(rounded, held), [*map(rounded, seconds)]])
    return found


def rounded(value: float) -> float:
    return float(f"{value:.3g}")


def main() -> None:
    multiprocessing.set_forkserver_preload(["tp2d_lib.cost.dryrun", "tp2d_lib.fsdp"])
    cases = list(product(MODELS, LENGTHS, RANKS))
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        for name in MODELS:
            sizes.write_config(name, folder)
        with ThreadPoolExecutor(os.cpu_count()) as threads:
            found = list(threads.map(lambda case: rows(folder, *case), cases))
    content = {
        "models": MODELS,
        "lengths": LENGTHS,
        "ranks": RANKS,
        "gpus": {k: rounded(meshes.FULL * gpus.find(k).memory) for k in KINDS},
        "rows": {
            "/".join(map(str, case)): each
            for case, each in zip(cases, found, strict=True)
        },
    }
    FILE.write_text(json.dumps(content, separators=(",", ":")) + "\n")


if __name__ == "__main__":
    main()
