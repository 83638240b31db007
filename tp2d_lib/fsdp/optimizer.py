"""The norm of the gradient that the PyTorch engine's optimizer is given."""

from __future__ import annotations

from collections import defaultdict
from math import prod

import torch
import torch.distributed as dist
from torch import nn


@torch.no_grad()  # so that to_local is cheap
def global_grad_norm(model: nn.Module) -> torch.Tensor:
    """The 2-norm of the global gradient, a 0-d tensor equal on every rank.

    Each rank sums the squares of its shards; one that n ranks hold counts 1 / n.
    """
    held_by = defaultdict(list)  # so many ranks each
    for parameter in model.parameters():
        gradient = parameter.grad
        if gradient is None:  # of a parameter that is not trained
            continue
        sizes = zip(gradient.device_mesh.shape, gradient.placements, strict=True)
        copies = prod(size for size, where in sizes if where.is_replicate())
        held_by[copies].append(gradient.to_local())
    norms = ((nn.utils.get_total_norm(shards), n) for n, shards in held_by.items())
    total = sum(norm.square() / copies for norm, copies in norms)
    dist.all_reduce(total)
    return total.sqrt()
