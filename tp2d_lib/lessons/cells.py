"""Functions that cells of both notebooks mirror."""

from __future__ import annotations

import hashlib
import itertools
import os
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import torch
import torch.distributed as dist
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer

from tp2d_lib.config import TrainConfig
from tp2d_lib.data import BatchLoader, build_dataloader
from tp2d_lib.mesh import build_mesh


def who_am_i(here: SimpleNamespace) -> dict:
    """A live rank's place in the 2x2 mesh."""
    here.mesh = build_mesh(dp_size=2, tp_size=2, device_type="cpu")
    dp_rank, tp_rank = here.mesh.get_coordinate()
    tp, dp = here.mesh.get_group("tp"), here.mesh.get_group("dp")
    groups = {"TP group": dist.get_process_group_ranks(tp)}
    groups |= {"DP group": dist.get_process_group_ranks(dp)}
    place = {"dp_rank": dp_rank, "tp_rank": tp_rank}
    return {"rank": here.rank, "process": str(os.getpid()), **place, **groups}


def first_batch(here: SimpleNamespace, config: TrainConfig) -> dict:
    """A fingerprint of the first rows that a live rank reads."""
    loader = build_dataloader(config, here.mesh)
    input_ids = next(iter(loader))[0]["input_ids"]
    fingerprint = hashlib.sha256(input_ids.numpy().tobytes()).hexdigest()[:8]
    dp_rank, tp_rank = here.mesh.get_coordinate()
    place = {"rank": here.rank, "dp_rank": dp_rank, "tp_rank": tp_rank}
    read = {"rows x tokens": tuple(input_ids.shape), "fingerprint": fingerprint}
    return place | read


def train_plain(config: TrainConfig, steps: int, model=None) -> tuple[list, dict]:
    """Losses and weights of a plain loop in one process, on the same rows."""
    alone = replace(config, tp_size=1, dp_size=1, num_workers=1, batch_size_per_gpu=4)
    model = model or AutoModelForCausalLM.from_pretrained(config.model_name)
    kind = {"adamw": torch.optim.AdamW, "sgd": torch.optim.SGD}[config.optimizer]
    rates = {"lr": config.learning_rate, "weight_decay": config.weight_decay}
    optimizer = kind(model.parameters(), **rates)
    loader, losses = BatchLoader(alone, Path(config.prepared_data), dp_rank=0), []
    for (micro,) in itertools.islice(loader, steps):
        loss = model(**micro).loss
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), config.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses, dict(model.named_parameters())


def adapt(model_name: str, start: dict[str, torch.Tensor]) -> nn.Module:
    """A frozen model in one process, with the adapters in ``start`` in its layers."""
    model = AutoModelForCausalLM.from_pretrained(model_name).requires_grad_(False)
    for name in [name for name in start if name.endswith(".lora_A")]:
        layer = model.get_submodule(name.removesuffix(".lora_A"))
        layer.a = nn.Parameter(start[name])
        layer.b = nn.Parameter(start[f"{name[:-1]}B"])
        layer.register_forward_hook(
            lambda layer, given, out: out + 2 * given[0] @ layer.a.T @ layer.b.T
        )
    return model


def save_prompt_logits(engine, config: TrainConfig, prompt: str) -> None:
    """Save a prompt's logits from the trained engine, to compare them later."""
    tokenizer = AutoTokenizer.from_pretrained(config.model_name)
    tokens = tokenizer(prompt, return_tensors="pt").to(engine.device)
    with torch.no_grad():
        logits = engine.model(tokens.input_ids).logits.float().cpu()
    if dist.get_rank() == 0:
        torch.save(logits, f"{config.export_to}/prompt_logits.pt")
