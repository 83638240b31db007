"""Collectives on plain tensors, and what each does in backward."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
import torch.distributed as dist

Collective = Callable[[torch.Tensor, dist.ProcessGroup], torch.Tensor]
# PyTorch before 2.13 has both by their old names only, which 2.13 deprecates.
GATHER = "all_gather_single", "all_gather_into_tensor"
REDUCE = "reduce_scatter_single", "reduce_scatter_tensor"
gather_single, reduce_single = (
    getattr(dist, name, None) or getattr(dist, old) for name, old in (GATHER, REDUCE)
)


def all_gather(x: torch.Tensor, group: dist.ProcessGroup, dim: int = 1) -> torch.Tensor:
    """Join the parts of every rank along ``dim``: (batch, seq / tp, hidden) -> all."""
    parts = x.new_empty(group.size() * len(x), *x.shape[1:])
    gather_single(parts, x.contiguous(), group=group)
    return parts.view(group.size(), *x.shape).movedim(0, dim).flatten(dim, dim + 1)


def reduce_scatter(x: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
    """(batch, seq, hidden) on every rank, summed -> (batch, seq / tp, hidden)."""
    batch, seq, hidden = x.shape
    ranks = group.size()
    parts = x.view(batch, ranks, seq // ranks, hidden).transpose(0, 1).contiguous()
    own = x.new_empty(batch, seq // ranks, hidden)
    reduce_single(own, parts.flatten(0, 1), group=group)
    return own


def all_reduce(x: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
    """The sum over the ranks, in memory of its own."""
    whole = x.clone(memory_format=torch.contiguous_format)
    dist.all_reduce(whole, group=group)
    return whole


def own_columns(x: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
    """This rank's features of (batch, seq, features)."""
    return x.chunk(group.size(), dim=2)[group.rank()].contiguous()


def same(x: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
    return x.view_as(x)


def differentiable(forward: Collective, backward: Collective):
    """An autograd function ``apply(x, group)`` of two collectives."""

    class Differentiable(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
            ctx.group = group
            return forward(x, group)

        @staticmethod
        def backward(ctx, gradient: torch.Tensor) -> tuple[torch.Tensor, None]:
            return backward(gradient, ctx.group), None

    return Differentiable


# Over the positions: what follows needs all of them, so each rank's gradient is a part.
AllGather = differentiable(all_gather, reduce_scatter)
ReduceScatter = differentiable(reduce_scatter, all_gather)
# The sum is the same on every rank, and so is its gradient; and the other way round.
AllReduce = differentiable(all_reduce, same)
SumGradient = differentiable(same, all_reduce)
# Over the features: what follows, and so the gradient, is the same on every rank.
GatherColumns = differentiable(partial(all_gather, dim=2), own_columns)
SplitColumns = differentiable(own_columns, partial(all_gather, dim=2))
