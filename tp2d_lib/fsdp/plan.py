"""The tensor-parallel plan, and a model sharded by it: over tp, then over dp."""

from __future__ import annotations

import inspect
from collections.abc import Iterator

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    ParallelStyle,
    PrepareModuleInput,
    RowwiseParallel,
    SequenceParallel,
    parallelize_module,
)

from tp2d_lib.fsdp.local import OnShards, on_local_shards
from tp2d_lib.fsdp.whole import ComputeWhole, keys_of, parent, parts_left_whole
from tp2d_lib.model import PlanError, decoder_layers
from tp2d_lib.model.blocks import STYLES, is_norm, shardable

SMALLEST_GROUP = 8 * 2**20  # bytes of weights that are gathered at once


def tensor_parallel_plan(model: nn.Module, stream: Placement = Shard(1)) -> dict:
    """Turn the model's published ``tp_plan``, or usual names, into DTensor styles.

    Embedding and head are sharded over the vocabulary. A block all-gathers the residual
    stream (batch, seq / tp, hidden) and reduce-scatters the ranks' sum; a stream that
    is ``Replicate()`` has all positions, and is summed. Then tp ranks may compute other
    blocks in full. ``*`` stands for any layer.

    Raises:
        PlanError: no block can be sharded, or a parameter is left out.
    """
    styles, plan = shardable(model, STYLES), {}
    if not styles:
        raise PlanError(
            f"{type(model).__name__} must have layers that can be sharded over tp "
            "ranks, by a tp_plan or by their names, but has none; try tp_size=1"
        )
    whole, keys = parts_left_whole(model, styles), keys_of(model, styles)
    for name, module in model.named_modules():
        style = styles.get(name)
        if module is model.get_input_embeddings():
            style = "vocabulary_rows"
        elif module is model.get_output_embeddings():
            style = "vocabulary_columns"
        elif style is None and is_norm(module) and not whole:
            style = "norm"
        if style is not None:
            plan[keys[name]] = dtensor_style(style, stream)
            if style.startswith("colwise"):
                block = parent(name)
                plan[keys[block]] = gather_input(model.get_submodule(block), stream)
    return plan | {name: ComputeWhole() for name in whole}  # last: of what is left


def dtensor_style(style: str, stream: Placement) -> ParallelStyle:
    """The DTensor style for a published style; comments note what is communicated."""
    if style == "vocabulary_rows":  # of the embedding; partial sums -> stream
        return RowwiseParallel(input_layouts=Replicate(), output_layouts=stream)
    if style == "vocabulary_columns":  # of the head; logits stay sharded
        return ColwiseParallel(
            input_layouts=stream, output_layouts=Shard(-1), use_local_output=False
        )
    if style == "norm" and stream.is_shard():  # of own positions; sums its gradient
        return SequenceParallel(use_local_output=True)
    if style in ("norm", "norm_of_all"):  # every rank computes the same
        return OnShards(same=True)
    if style == "colwise":  # output features; no communication
        return ColwiseParallel()
    if style == "colwise_gather_output":  # all-gathered: the block works on all of them
        return ColwiseParallel(output_layouts=Replicate())
    if style == "rowwise":  # input features; partial sums -> stream
        return RowwiseParallel(output_layouts=stream)
    if style == "rowwise_split_input":  # of which each rank takes its own
        return RowwiseParallel(input_layouts=Replicate(), output_layouts=stream)
    # replicated_with_grad_allreduce: a norm on local heads (batch, seq, heads,
    # head_dim), with a replicated weight and a partial gradient. Naming the head
    # dimension makes DTensor sum it over tp.
    return SequenceParallel(sequence_dim=2, use_local_output=True)


def gather_input(block: nn.Module, stream: Placement) -> PrepareModuleInput:
    """All-gather a block's input over tp, and sum its gradient in backward.

    Decoder layers pass it to attention by keyword and to the MLP by position.
    """
    if "attention_mask" in inspect.signature(block.forward).parameters:
        return PrepareModuleInput(
            input_kwarg_layouts={"hidden_states": stream},
            desired_input_kwarg_layouts={"hidden_states": Replicate()},
        )
    return PrepareModuleInput(input_layouts=stream, desired_input_layouts=Replicate())


def apply_tp(model: nn.Module, mesh: DeviceMesh, plan: dict) -> None:
    """Shard every layer over the tp ranks, in place, and keep tied weights tied.

    Its layers compute on plain tensors: the same shards and sums in less time.
    """
    tied = model.get_output_embeddings().weight is model.get_input_embeddings().weight
    parallelize_module(model, mesh, on_local_shards(plan))
    if tied:  # parallelize_module turned one parameter into two
        model.get_output_embeddings().weight = model.get_input_embeddings().weight
    for name, parameter in model.named_parameters():
        if not isinstance(parameter, DTensor):
            raise PlanError(
                f"the plan must cover every parameter, but leaves {name!r} off the tp "
                "mesh; try tp_size=1"
            )


def layer_groups(model: nn.Module, dtype: torch.dtype) -> Iterator[list[nn.Module]]:
    """Neighboring layers to gather over dp at once, because a collective takes time.

    A group holds at least ``SMALLEST_GROUP`` bytes of weights on a rank. The last
    layers are in none if they hold less.
    """
    group, size = [], 0
    for layer in decoder_layers(model):
        group.append(layer)
        for p in layer.parameters():
            shard = p.to_local() if isinstance(p, DTensor) else p
            size += shard.numel() * dtype.itemsize
        if size >= SMALLEST_GROUP:
            yield group
            group, size = [], 0


def apply_fsdp(model: nn.Module, mesh: DeviceMesh, dtype: torch.dtype) -> None:
    """Shard every parameter again over the dp ranks, to be gathered layer by layer.

    The head, and last layers too small for a group, stay gathered after the forward
    pass: backward needs them first. The embedding, in a group of its own, does not.
    """
    policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32)
    for layers in layer_groups(model, dtype):
        fully_shard(layers, mesh=mesh, mp_policy=policy)
    embedding = model.get_input_embeddings()
    if model.get_output_embeddings().weight is not embedding.weight:
        fully_shard(embedding, mesh=mesh, mp_policy=policy)
    fully_shard(model, mesh=mesh, mp_policy=policy)


def parallelize(model: nn.Module, mesh: DeviceMesh, dtype, stream=Shard(1)):
    """Parallelize a model in two dimensions: first over tp, then over dp."""
    if mesh["tp"].size() > 1:
        apply_tp(model, mesh["tp"], tensor_parallel_plan(model, stream))
    dp = mesh.mesh_dim_names[:-1]  # ("dp",); with HSDP ("dp_replicate", "dp_shard")
    apply_fsdp(model, mesh[dp], dtype)
    return model
