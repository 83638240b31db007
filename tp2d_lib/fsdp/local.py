"""The layers' styles again, computed on plain tensors: fewer and cheaper operators.

PyTorch's styles run a layer on DTensors: every operator of every linear layer and norm
looks up how its inputs are placed, every time. Here parameters are the same DTensors,
and the same sums are communicated, but a module computes with this rank's shards.
"""

from __future__ import annotations

import torch
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

from tp2d_lib.fsdp.collectives import (
    AllGather,
    AllReduce,
    GatherColumns,
    ReduceScatter,
    SplitColumns,
    SumGradient,
)


def on_local_shards(plan: dict[str, ParallelStyle]) -> dict[str, ParallelStyle]:
    """The same plan with its layers computed on plain tensors.

    The head stays: the loss takes its logits as a DTensor. So does the whole plan if
    it holds a style that this project does not write, because that may expect a DTensor
    from the others.
    """
    local = {name: equivalent(style) for name, style in plan.items()}
    return plan if None in local.values() else local


def equivalent(style: ParallelStyle) -> ParallelStyle | None:
    """A style that communicates and returns the same, or None if there is none."""
    kind = type(style)
    if isinstance(style, OnPlainTensors):
        return style
    if kind is PrepareModuleInput:
        before = style.input_layouts or tuple(style.input_kwarg_layouts.values())
        return OnInput(AllGather if before == (Shard(1),) else SumGradient)
    if kind is SequenceParallel:
        return OnShards()
    if kind is ColwiseParallel and style.use_local_output:
        gather = GatherColumns if style.output_layouts == (Replicate(),) else None
        return OnShards(gather, weight=0, bias=0, lora_B=0)
    if kind is RowwiseParallel:
        is_split = style.output_layouts == (Shard(1),)
        add = ReduceScatter if is_split else AllReduce
        has_parts = style.input_layouts == (Shard(-1),)
        return OnRows(add, None if has_parts else SplitColumns)
    return style if kind is ColwiseParallel else None


def compute(
    module: nn.Module, tensors: dict[str, torch.Tensor], x: torch.Tensor
) -> torch.Tensor:
    """The forward of the module's class, with tensors in place of its parameters.

    An attribute comes before a parameter of the same name. The module's hooks, FSDP's
    among them, belong to its call and do not run again.
    """
    module.__dict__.update(tensors)
    try:
        return type(module).forward(module, x)
    finally:
        for name in tensors:
            del module.__dict__[name]


def shard(
    parameter: nn.Parameter, mesh: DeviceMesh, where: Shard | Replicate
) -> nn.Parameter:
    """The parameter as a DTensor."""
    sharded = distribute_tensor(parameter.data, mesh, [where])
    return nn.Parameter(sharded, requires_grad=parameter.requires_grad)


class OnPlainTensors(ParallelStyle):
    """A style of this project, which gives and takes no DTensor."""


class OnInput(OnPlainTensors):
    """Communicate the input of a block: an MLP's argument, attention's keyword."""

    def __init__(self, communicate: type[torch.autograd.Function]):
        self.communicate = communicate

    def _apply(self, module: nn.Module, mesh: DeviceMesh) -> nn.Module:
        group = mesh.get_group()

        def prepare(_, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
            if args:
                return (self.communicate.apply(args[0], group), *args[1:]), kwargs
            whole = self.communicate.apply(kwargs["hidden_states"], group)
            return args, kwargs | {"hidden_states": whole}

        module.register_forward_pre_hook(prepare, with_kwargs=True)
        return module


class OnShards(OnPlainTensors):
    """Compute a module with this rank's shards of its parameters.

    Args:
        communicate: what is done with the outputs. Where they are parts of a sum, a
            replicated bias is shared out among the parts.
        split: what is done with the input.
        same: whether every rank computes the same from the same inputs.
        dims: by name of a parameter, the dimension it is sharded over. Others are
            replicated, and their gradients, unless they are the ``same``, are each of
            a share of the positions or features, and summed over tp.
    """

    def __init__(
        self,
        communicate: type[torch.autograd.Function] | None = None,
        split: type[torch.autograd.Function] | None = None,
        same: bool = False,
        **dims: int,
    ):
        self.communicate, self.split = communicate, split
        self.same, self.dims = same, dims

    def _apply(self, module: nn.Module, mesh: DeviceMesh) -> nn.Module:
        for name, parameter in list(module.named_parameters(recurse=False)):
            where = Shard(self.dims[name]) if name in self.dims else Replicate()
            module.register_parameter(name, shard(parameter, mesh, where))
        group = mesh.get_group()
        is_part = self.communicate in (AllReduce, ReduceScatter)
        summed = None if self.same else [Partial()]

        def forward(x: torch.Tensor) -> torch.Tensor:
            shards = {}
            for name, parameter in module.named_parameters(recurse=False):
                if name in self.dims:
                    shards[name] = parameter.to_local()
                    continue
                shards[name] = parameter.to_local(grad_placements=summed)
                if is_part and name == "bias":
                    shards[name] = shards[name] / mesh.size()
            x = self.split.apply(x, group) if self.split else x
            out = compute(module, shards, x)
            return self.communicate.apply(out, group) if self.communicate else out

        module.forward = forward
        return module


class OnRows(OnPlainTensors):
    """Sum what each rank computes: of its input features, or of its tokens.

    An embedding is looked up in this rank's rows; tokens of others count as 0.
    """

    def __init__(
        self,
        communicate: type[torch.autograd.Function],
        split: type[torch.autograd.Function] | None,
    ):
        self.communicate, self.split = communicate, split

    def _apply(self, module: nn.Module, mesh: DeviceMesh) -> nn.Module:
        if not isinstance(module, nn.Embedding):
            rows = OnShards(self.communicate, self.split, weight=1, lora_A=1)
            return rows._apply(module, mesh)
        module.weight = shard(module.weight, mesh, Shard(0))
        rows = len(module.weight.to_local())
        first = mesh.get_local_rank() * -(-len(module.weight) // mesh.size())
        if module.padding_idx is not None:  # a row that gets no gradient
            here = module.padding_idx - first
            module.padding_idx = here if 0 <= here < rows else None
        group = mesh.get_group()

        def forward(tokens: torch.Tensor) -> torch.Tensor:
            found = tokens - first
            elsewhere = (found < 0) | (found >= rows)
            shard, found = module.weight.to_local(), found.masked_fill(elsewhere, 0)
            out = compute(module, {"weight": shard}, found)
            out = out.masked_fill(elsewhere.unsqueeze(-1), 0)
            return self.communicate.apply(out, group)

        module.forward = forward
        return module
