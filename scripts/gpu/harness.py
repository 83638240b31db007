"""What the checks share: one mesh with its files, and a line for each check."""

from __future__ import annotations

import gc
import itertools
import json
import os
import shutil
import traceback
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from importlib import import_module
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh
from transformers import AutoModelForCausalLM, AutoTokenizer, Qwen2Config

from tp2d_lib.config import TrainConfig, first_line
from tp2d_lib.data import build_dataloader, demo
from tp2d_lib.mesh import build_mesh

ROWS = 8  # in a global batch
LARGE = {  # 412M parameters, to measure speed and memory on a GPU
    "vocab_size": 32_768,
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "max_position_embeddings": 1024,
    "tie_word_embeddings": True,
}


class Skipped(Exception):
    """Why a check cannot be made on this machine."""


class Failed(Exception):
    """The figures of a check that did not hold."""


def within(**figures: tuple[float, float]) -> str:
    """Errors and the largest allowed ones, as text; fails if one is larger."""
    text = ", ".join(
        f"{name} {value:.1e} (at most {limit:.0e})"
        for name, (value, limit) in figures.items()
    )
    if not all(value <= limit for value, limit in figures.values()):
        raise Failed(text)
    return text


@dataclass
class Run:
    """One mesh, and configurations to train on it."""

    tp_size: int
    dp_size: int
    place: Path  # of the files; every rank sees it
    device: str
    deterministic: bool

    def __str__(self) -> str:
        return f"tp {self.tp_size} x dp {self.dp_size}"

    @cached_property
    def mesh(self) -> DeviceMesh:
        return build_mesh(self.dp_size, self.tp_size, self.device)

    def config(self, **settings) -> TrainConfig:
        """The demo model in float32, unless the settings say otherwise."""
        usual = {
            "model_name": str(self.place / "demo" / "model"),
            "prepared_data": str(self.place / "rows-128"),
            "seq_length": 128,
            "batch_size_per_gpu": ROWS // self.dp_size,
            "learning_rate": 1e-3,
            "dtype": "float32",
            "run_name": "check",
        }
        return TrainConfig(
            **(usual | settings),
            tp_size=self.tp_size,
            dp_size=self.dp_size,
            storage_path=str(self.place),
            device=self.device,
            deterministic=self.deterministic,
        )

    def large(self, **settings) -> TrainConfig:
        """The largest model for this device, in the type that it trains fastest in."""
        if self.device == "cpu":
            return self.config(**settings)
        return self.config(
            model_name=str(self.place / "large"),
            prepared_data=str(self.place / "rows-1024"),
            seq_length=1024,
            batch_size_per_gpu=4,
            dtype="auto",
            **settings,
        )

    def build(self, config: TrainConfig, engine: str = "fsdp"):
        return import_module(f"tp2d_lib.{engine}").build_engine(config, self.mesh)

    def batches(self, config: TrainConfig, steps: int) -> list:
        loader = build_dataloader(replace(config, num_epochs=100), self.mesh)
        return list(itertools.islice(loader, steps))

    def folder(self, name: str) -> Path:
        """Where this mesh writes; every rank must call it."""
        path = self.place / f"tp{self.tp_size}-dp{self.dp_size}" / name
        path.mkdir(parents=True, exist_ok=True)
        dist.barrier()
        return path


class Report:
    """Makes checks on all ranks; rank 0 prints a line for each and keeps it."""

    def __init__(self):
        self.rows: list[tuple[str, str, str, str]] = []

    def check(self, run: Run, name: str, function: Callable[[Run], str]) -> None:
        """A check returns its figures, or raises what kept it from holding."""
        try:
            mine = ("ok", function(run))
        except Skipped as why:
            mine = ("skipped", str(why))
        except Failed as error:
            mine = ("FAILED", str(error))
        except Exception as error:
            traceback.print_exc()
            mine = ("FAILED", f"{type(error).__name__}: {first_line(error)}")
        every = [mine] * dist.get_world_size()
        dist.all_gather_object(every, mine)
        result, figures = next((one for one in every if one[0] == "FAILED"), every[0])
        self.rows.append((str(run), name, result, figures))
        if dist.get_rank() == 0:
            shown = "skipped:" if result == "skipped" else result
            print(f"{shown:<10}{run!s:<14}{name:<32}{figures}", flush=True)
        gc.collect()  # engines refer to themselves
        if run.device == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()

    @property
    def failed(self) -> bool:
        return any(result == "FAILED" for _, _, result, _ in self.rows)


def write_files(place: Path, large: bool) -> None:
    """The demo model, its corpus in rows, and on request a larger random model."""
    model, dataset = demo.write(place / "demo")
    lines = Path(dataset, "train.jsonl").read_text("utf-8").splitlines()
    text = "\n\n".join(json.loads(line)["text"] for line in lines)
    ids = AutoTokenizer.from_pretrained(model)(text, verbose=False)["input_ids"]
    for length in (128, 1024):
        count = len(ids) // length
        rows = np.array(ids[: count * length], np.int32).reshape(count, length)
        lengths = np.full(count, length, np.int32)
        if length == 128:  # padded, so that dp ranks have unequal numbers of tokens
            lengths = np.random.default_rng(0).integers(32, 129, count, np.int32)
        folder = place / f"rows-{length}"
        folder.mkdir()
        np.save(folder / "input_ids.npy", rows)
        np.save(folder / "lengths.npy", lengths)
    packed = shutil.copytree(place / "rows-128", place / "rows-128-documents")
    starts = np.random.default_rng(0).random((len(ids) // 128, 128)) < 0.05
    starts[:, 0] = True
    np.save(packed / "starts.npy", starts)
    if large:
        torch.manual_seed(0)
        AutoModelForCausalLM.from_config(
            Qwen2Config(**LARGE), dtype=torch.float32
        ).save_pretrained(place / "large")


def join(device: str) -> None:
    """Join the group of torchrun's ranks, or make one of this process alone."""
    backend = "nccl" if device == "cuda" else "gloo"  # as in a run through Ray
    own = None
    if device == "cuda":
        local_rank = int(os.environ.get("LOCAL_RANK", 0))
        own = torch.device("cuda", local_rank % torch.cuda.device_count())
        torch.cuda.set_device(own)
    if "RANK" in os.environ:
        dist.init_process_group(backend, device_id=own)
        return
    os.environ.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1")  # DeepSpeed reads them
    dist.init_process_group(
        backend, store=dist.HashStore(), rank=0, world_size=1, device_id=own
    )
