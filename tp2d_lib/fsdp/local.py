"""The layers' styles again, computed on plain tensors: fewer and cheaper operators.

PyTorch's styles run a layer on DTensors: every operator of every linear layer and norm
looks up how its inputs are placed, every time. Here parameters are the same DTensors,
and the same sums are communicated, but a module computes with this rank's shards.
"""

from __future__ import annotations

from copy import copy

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import Partial, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    ParallelStyle,
    PrepareModuleInput,
    RowwiseParallel,
    SequenceParallel,
)
from torch.func import functional_call


def on_local_shards(plan: dict[str, ParallelStyle]) -> dict[str, ParallelStyle]:
    """The same plan with its layers computed on plain tensors.

    Embedding and head stay: the loss takes the head's logits as a DTensor. So does
    the whole plan if it holds a style that this project does not write, because that
    may expect a DTensor from the others.
    """
    local = {name: equivalent(style) for name, style in plan.items()}
    return plan if None in local.values() else local


def equivalent(style: ParallelStyle) -> ParallelStyle | None:
    """A style that communicates and returns the same, or None if there is none."""
    kind = type(style)
    if kind is PrepareModuleInput:
        return GatherInput()
    if kind is SequenceParallel:
        return OnShards()
    if kind is ColwiseParallel:
        return OnShards(weight=0, bias=0) if style.use_local_output else style
    if kind is RowwiseParallel:
        is_linear = style.input_layouts == (Shard(-1),)
        return OnShards(weight=1, sum_outputs=True) if is_linear else style
    return None


def all_gather(x: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
    """(batch, seq / tp, hidden) of every rank -> (batch, seq, hidden)."""
    batch, positions, hidden = x.shape
    ranks = group.size()
    parts = x.new_empty(ranks * batch, positions, hidden)
    dist.all_gather_single(parts, x.contiguous(), group=group)
    parts = parts.view(ranks, batch, positions, hidden).transpose(0, 1)
    return parts.reshape(batch, ranks * positions, hidden)


def reduce_scatter(x: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
    """(batch, seq, hidden) on every rank, summed -> (batch, seq / tp, hidden)."""
    batch, seq, hidden = x.shape
    ranks = group.size()
    parts = x.view(batch, ranks, seq // ranks, hidden).transpose(0, 1).contiguous()
    own = x.new_empty(batch, seq // ranks, hidden)
    dist.reduce_scatter_single(own, parts.flatten(0, 1), group=group)
    return own


class AllGather(torch.autograd.Function):
    """Over the positions; the gradient, a part of a sum on every rank, is summed."""

    @staticmethod
    def forward(ctx, x: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
        ctx.group = group
        return all_gather(x, group)

    @staticmethod
    def backward(ctx, gradient: torch.Tensor) -> tuple[torch.Tensor, None]:
        return reduce_scatter(gradient, ctx.group), None


class ReduceScatter(torch.autograd.Function):
    """Over the positions; the gradient of all of them is needed on every rank."""

    @staticmethod
    def forward(ctx, x: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
        ctx.group = group
        return reduce_scatter(x, group)

    @staticmethod
    def backward(ctx, gradient: torch.Tensor) -> tuple[torch.Tensor, None]:
        return all_gather(gradient, ctx.group), None


class GatherInput(ParallelStyle):
    """All-gather the input of a block: an MLP's argument, attention's keyword."""

    def _apply(self, module: nn.Module, mesh: DeviceMesh) -> nn.Module:
        group = mesh.get_group()

        def gather(_, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
            if args:
                return (AllGather.apply(args[0], group), *args[1:]), kwargs
            whole = AllGather.apply(kwargs["hidden_states"], group)
            return args, kwargs | {"hidden_states": whole}

        module.register_forward_pre_hook(gather, with_kwargs=True)
        return module


class OnShards(ParallelStyle):
    """Compute a module with this rank's shards of its parameters.

    Args:
        sum_outputs: they are parts of a sum over tp, of which each rank gets its
            seq / tp positions; a replicated bias is shared out among the parts.
        dims: by name of a parameter, the dimension it is sharded over. Others are
            replicated, and their gradients, each of a share of the positions or of
            the heads, are summed over tp.
    """

    def __init__(self, sum_outputs: bool = False, **dims: int):
        self.sum_outputs, self.dims = sum_outputs, dims

    def _apply(self, module: nn.Module, mesh: DeviceMesh) -> nn.Module:
        whole = copy(module)  # with the same parameters, and the forward of its class
        for name, parameter in list(module.named_parameters(recurse=False)):
            where = Shard(self.dims[name]) if name in self.dims else Replicate()
            sharded = distribute_tensor(parameter.data, mesh, [where])
            sharded = nn.Parameter(sharded, requires_grad=parameter.requires_grad)
            module.register_parameter(name, sharded)
        group = mesh.get_group()

        def forward(x: torch.Tensor) -> torch.Tensor:
            shards = {}
            for name, parameter in module.named_parameters(recurse=False):
                if name in self.dims:
                    shards[name] = parameter.to_local()
                    continue
                shards[name] = parameter.to_local(grad_placements=[Partial()])
                if self.sum_outputs:
                    shards[name] = shards[name] / mesh.size()
            out = functional_call(whole, shards, (x,))
            return ReduceScatter.apply(out, group) if self.sum_outputs else out

        module.forward = forward
        return module
