"""The tensor-parallel plan, and a model sharded by it: over tp, then over dp."""

from __future__ import annotations

import re

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    PrepareModuleInput,
    RowwiseParallel,
    SequenceParallel,
    parallelize_module,
)

from tp2d_lib.fsdp.local import on_local_shards
from tp2d_lib.model import PlanError


def tensor_parallel_plan(model: nn.Module) -> dict:
    """Turn the model's published ``tp_plan`` into sequence-parallel DTensor styles.

    Embedding and head are sharded over the vocabulary. Between blocks the residual
    stream (batch, seq, hidden) is ``Shard(1)``: seq / tp positions per rank. A block
    all-gathers it, computes on its own heads or ffn columns, and reduce-scatters the
    sum. ``*`` in a module's name stands for a layer number.

    Raises:
        PlanError: no plan, an unknown style, or a parameter that it leaves replicated.
    """
    published = dict(model.tp_plan or {})
    if not any("layers" in name for name in published):
        raise PlanError(
            f"{type(model).__name__} must publish a tp_plan for its layers to be "
            "sharded over tp ranks, but has none; try tp_size=1"
        )
    plan = {}
    for name, module in model.named_modules():
        pattern = re.sub(r"\.\d+(?=\.|$)", ".*", name)
        style = published.get(pattern)
        if module is model.get_input_embeddings():
            style = "vocabulary_rows"
        elif module is model.get_output_embeddings():
            style = "vocabulary_columns"
        if style is None and type(module).__name__.endswith("Norm"):
            plan[pattern] = SequenceParallel(use_local_output=True)
        elif style is not None:
            plan[pattern] = dtensor_style(pattern, style, module)
            if style == "colwise":
                block = model.get_submodule(name.rpartition(".")[0])
                plan[pattern.rpartition(".")[0]] = gather_input(block)
    for name, _ in model.named_parameters():
        module = re.sub(r"\.\d+(?=\.)", ".*", name.rpartition(".")[0])
        if isinstance(plan.get(module), PrepareModuleInput | None):
            raise PlanError(
                f"the plan must cover every parameter, but leaves {name!r} "
                "replicated; try tp_size=1"
            )
    return plan


def dtensor_style(name: str, style: str, module: nn.Module):
    """The DTensor style for a published style; comments note what is communicated."""
    is_norm = type(module).__name__.endswith("Norm")
    if style == "vocabulary_rows":  # of the embedding; partial sums -> own positions
        return RowwiseParallel(input_layouts=Replicate(), output_layouts=Shard(1))
    if style == "vocabulary_columns":  # of the head; logits stay sharded
        return ColwiseParallel(
            input_layouts=Shard(1), output_layouts=Shard(-1), use_local_output=False
        )
    if style == "colwise":  # output features; no communication
        return ColwiseParallel()
    if style == "rowwise":  # input features; partial sums -> own positions
        return RowwiseParallel(output_layouts=Shard(1))
    if style == "replicated_with_grad_allreduce" and is_norm:
        # A norm on local heads (batch, seq, heads, head_dim): replicated weight,
        # partial gradient. Naming the head dimension makes DTensor sum it over tp.
        return SequenceParallel(sequence_dim=2, use_local_output=True)
    raise PlanError(
        f"the style {style!r} of {name!r} must be one of colwise, rowwise, or "
        "replicated_with_grad_allreduce on a norm; try tp_size=1"
    )


def gather_input(block: nn.Module) -> PrepareModuleInput:
    """All-gather a block's input over tp: seq / tp -> seq positions.

    Decoder layers pass it to attention by keyword and to the MLP by position.
    """
    if "attention_mask" in block.forward.__code__.co_varnames:
        return PrepareModuleInput(
            input_kwarg_layouts={"hidden_states": Shard(1)},
            desired_input_kwarg_layouts={"hidden_states": Replicate()},
        )
    return PrepareModuleInput(input_layouts=Shard(1), desired_input_layouts=Replicate())


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


def apply_fsdp(model: nn.Module, mesh: DeviceMesh, dtype: torch.dtype) -> None:
    """Shard every parameter again over the dp ranks, to be gathered layer by layer.

    The head's, which backward needs first, stay gathered after forward. So would the
    embedding's, if it had no group of its own.
    """
    policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32)
    for layer in model.get_decoder().layers:
        fully_shard(layer, mesh=mesh, mp_policy=policy)
    embedding = model.get_input_embeddings()
    if model.get_output_embeddings().weight is not embedding.weight:
        fully_shard(embedding, mesh=mesh, mp_policy=policy)
    fully_shard(model, mesh=mesh, mp_policy=policy)


def parallelize(model: nn.Module, mesh: DeviceMesh, dtype: torch.dtype) -> nn.Module:
    """Parallelise a model in two dimensions: first over tp, then over dp."""
    if mesh["tp"].size() > 1:
        apply_tp(model, mesh["tp"], tensor_parallel_plan(model))
    dp = mesh.mesh_dim_names[:-1]  # ("dp",); with HSDP ("dp_replicate", "dp_shard")
    apply_fsdp(model, mesh[dp], dtype)
    return model
