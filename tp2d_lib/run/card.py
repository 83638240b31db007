"""The model card of an export: from what it was trained, on what, and how."""

from __future__ import annotations

import os
import re
from importlib.metadata import version
from pathlib import Path

import torch.distributed as dist
from huggingface_hub import ModelCard, ModelCardData

from tp2d_lib import data, store
from tp2d_lib.config import FIELDS, TrainConfig
from tp2d_lib.validation import several

FILE = "README.md"
OURS = "tp2d"  # the tag of a card that the next export may replace
ALWAYS = {"seq_length", "pack", "learning_rate", "lr_scheduler_type", "warmup_steps"}
ALWAYS |= {"optimizer", "weight_decay", "max_grad_norm", "dtype", "seed"}
ELSEWHERE = {"model_name", "dataset_name", "prepared_data", "prepared_eval_data"}
ELSEWHERE |= {"eval_dataset", "tp_size", "dp_size", "num_workers", "device"}
HOW = [*FIELDS][: [*FIELDS].index("storage_path")]  # the rest is where


def export(engine, config: TrainConfig, history: list[dict]) -> str:
    """Let the engine export its model, and add the card; every rank must call it.

    A ``README.md`` that no export wrote stays.

    Args:
        history: the log records of the run.

    Returns:
        What was written, for the user.
    """
    said = engine.export(config.export_to)
    if dist.get_rank() > 0:
        return said
    path = store.path(config.export_to) / FILE
    if path.is_file() and OURS not in tags(path.read_bytes()):
        return f"{said}; its {FILE}, which no export wrote, stays as it is"
    path.write_text(write(engine.name, config, history))
    return said


def tags(card: bytes) -> list[str]:
    text = card.decode("utf-8", "replace")
    try:
        return ModelCard(text, ignore_metadata_errors=True).data.tags or []
    except Exception:  # whatever somebody's own text leads to
        return []


def write(engine: str, config: TrainConfig, history: list[dict]) -> str:
    """The card as Markdown, below what the Hub reads of it.

    Of a local path only the last part is told: the rest means nothing to others.
    """
    adapters = config.lora_rank and not config.merge_adapter
    sources = several(config.dataset_name)
    about = ModelCardData(
        base_model=None if is_local(config.model_name) else config.model_name,
        datasets=[name for name in sources if not is_local(name)] or None,
        library_name="peft" if adapters else "transformers",
        pipeline_tag="text-generation",
        tags=[OURS],
    )
    by = "DeepSpeed AutoTP" if engine == "autotp" else "FSDP2"
    releases = ["torch", "transformers", *["deepspeed"] * (engine == "autotp")]
    rows = f"{', '.join(map(shown, sources))}: {described(config.prepared_data)}"
    if config.eval_every:
        name = f"{shown(config.eval_dataset)}, " if config.eval_dataset else ""
        rows += f"\n\nHeld out: {name}{described(config.prepared_eval_data)}"
    return f"""---
{about.to_yaml()}
---

# {shown(config.export_to)}

{"LoRA adapters for" if adapters else "A model trained from"} {shown(config.model_name)}
with {by} on tp {config.tp_size} x dp {config.dp_size}. The export wrote this page; a
license, what the model is for and where it fails are yours to add.

## Data

{rows}

## Losses

{table(["step", "loss", "validation loss"], losses(history))}

## Settings

{config.global_batch_size} rows in a step; the run's `config.yaml` has all settings.

{table(["setting", "value"], settings(config))}

Made with {", ".join(f"{name} {version(name)}" for name in releases)}.
"""


def is_local(name: str) -> bool:
    return os.path.isabs(name) or "://" in name


def shown(name: str) -> str:
    return Path(name).name if is_local(name) else name


def described(rows: str) -> str:
    return re.sub(r"\S*/", "", data.describe(Path(rows)))


def losses(history: list[dict]) -> list[list[str]]:
    """The first and last record, and those with a validation loss."""
    kept = [r for r in history if "eval_loss" in r or r in (history[0], history[-1])]
    figure = "{:.4f}".format
    held_out = [figure(r["eval_loss"]) if "eval_loss" in r else "" for r in kept]
    return [
        [f"{r['step']:,}", figure(r["loss"]), eval_loss]
        for r, eval_loss in zip(kept, held_out, strict=True)
    ]


def settings(config: TrainConfig) -> list[list[str]]:
    """Those that decide most, and those that are not at their default."""
    values = {name: getattr(config, name) for name in HOW if name not in ELSEWHERE}
    return [
        [f"`{name}`", shown(str(value))]
        for name, value in values.items()
        if name in ALWAYS or value != FIELDS[name].default
    ]


def table(head: list[str], body: list[list[str]]) -> str:
    lines = [head, ["---"] * len(head), *body]
    cells = ([cell.replace("|", "\\|") for cell in line] for line in lines)
    return "\n".join(f"| {' | '.join(line)} |" for line in cells)
