"""The optimizer of both engines."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from tp2d_lib.config import TrainConfig


def build_optimizer(
    model: nn.Module, config: TrainConfig, fused_sgd: bool = True
) -> torch.optim.Optimizer:
    """AdamW or SGD over the parameters that are trained; the loop sets the rate.

    Fused, because the default, foreach, holds a copy of all that it updates.
    """
    options = {"lr": config.learning_rate, "weight_decay": config.weight_decay}
    if config.optimizer == "sgd":
        return torch.optim.SGD(groups(model, config), fused=fused_sgd, **options)
    options |= {"betas": (config.adam_beta1, config.adam_beta2)}
    options |= {"eps": config.adam_epsilon}
    return torch.optim.AdamW(groups(model, config), fused=True, **options)


def groups(model: nn.Module, config: TrainConfig) -> list[dict]:
    """One group of parameters, or those that are not to decay in one of their own."""
    trained = [p for p in model.parameters() if p.requires_grad]
    if config.decay == "all":
        return [{"params": trained}]
    matrices = [p for p in trained if p.ndim > 1]
    others = [p for p in trained if p.ndim < 2]
    rest = {"params": others, "weight_decay": 0.0, "weight_decay_scale": 0.0}
    return [{"params": matrices}, *([rest] if others else [])]


@contextmanager
def settings_kept(optimizer: torch.optim.Optimizer) -> Iterator[None]:
    """Let each group keep its settings while a checkpoint, which has others, is loaded.

    What was changed for a resume applies. And DeepSpeed's converted checkpoints would
    give the settings of the first group to all.
    """
    settings = [
        {name: value for name, value in group.items() if name != "params"}
        for group in optimizer.param_groups
    ]
    yield
    for group, own in zip(optimizer.param_groups, settings, strict=True):
        group.update(own)
