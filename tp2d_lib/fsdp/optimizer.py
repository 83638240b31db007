"""The optimizer of the PyTorch engine, and the norm of the gradient it is given."""

from __future__ import annotations

from collections import defaultdict
from math import prod

import torch
import torch.distributed as dist
from torch import nn

from tp2d_lib.config import TrainConfig


def build_optimizer(model: nn.Module, config: TrainConfig) -> torch.optim.Optimizer:
    options = {"lr": config.learning_rate, "weight_decay": config.weight_decay}
    if config.optimizer == "sgd":  # DTensor has no fused SGD
        return torch.optim.SGD(model.parameters(), **options)
    return torch.optim.AdamW(model.parameters(), fused=True, **options)


def global_grad_norm(model: nn.Module) -> torch.Tensor:
    """The 2-norm of the global gradient, a 0-d tensor equal on every rank.

    Each rank sums the squares of its shards; one that n ranks hold counts 1 / n.
    """
    held_by = defaultdict(list)  # so many ranks each
    for parameter in model.parameters():
        gradient = parameter.grad
        sizes = zip(gradient.device_mesh.shape, gradient.placements, strict=True)
        copies = prod(size for size, where in sizes if where.is_replicate())
        held_by[copies].append(gradient.to_local())
    total = sum(
        nn.utils.get_total_norm(shards).square() / copies
        for copies, shards in held_by.items()
    )
    dist.all_reduce(total)
    return total.sqrt()
