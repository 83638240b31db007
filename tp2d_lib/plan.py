"""The tensor-parallel plan: where a model is cut, and proof that no cut was missed."""

from __future__ import annotations

import re

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.tensor import Replicate, Shard
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    PrepareModuleInput,
    RowwiseParallel,
    SequenceParallel,
)


class PlanError(ValueError):
    """The tensor-parallel plan does not cover the model; names what is left."""


def tensor_parallel_plan(model: nn.Module) -> dict:
    """Turn the model's published ``tp_plan`` into DTensor styles, sequence-parallel.

    Embedding and head are cut over the vocabulary. Between blocks the residual stream
    (batch, seq, hidden) is ``Shard(1)``: seq / tp positions a rank. A block gathers it,
    computes on its own heads or ffn columns, and scatters the sum. ``*`` in a module's
    name stands for a layer number.

    Raises:
        PlanError: the model publishes no plan, or one with a style not known here.
    """
    published = dict(model.tp_plan or {})
    if not any("layers" in name for name in published):
        raise PlanError(
            f"{type(model).__name__} must publish a tp_plan for its layers to be split "
            "over tp ranks, but has none; try tp_size=1"
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
                f"the plan must cover every parameter, but leaves {name!r} whole; "
                "try tp_size=1"
            )
    return plan


def dtensor_style(name: str, style: str, module: nn.Module):
    """The DTensor style of one published style; a comment says what crosses tp."""
    is_norm = type(module).__name__.endswith("Norm")
    if style == "vocabulary_rows":  # of the embedding; partial sums -> own positions
        return RowwiseParallel(input_layouts=Replicate(), output_layouts=Shard(1))
    if style == "vocabulary_columns":  # of the head; logits stay cut
        return ColwiseParallel(
            input_layouts=Shard(1), output_layouts=Shard(-1), use_local_output=False
        )
    if style == "colwise":  # output features; nothing crosses
        return ColwiseParallel()
    if style == "rowwise":  # input features; partial sums -> own positions
        return RowwiseParallel(output_layouts=Shard(1))
    if style == "replicated_with_grad_allreduce" and is_norm:
        # A norm on local heads (batch, seq, heads, head_dim): whole weight, partial
        # gradient. Naming the head dimension makes DTensor sum it over tp.
        return SequenceParallel(sequence_dim=2, use_local_output=True)
    raise PlanError(
        f"the style {style!r} of {name!r} must be one of colwise, rowwise, or "
        "replicated_with_grad_allreduce on a norm; try tp_size=1"
    )


def gather_input(block: nn.Module) -> PrepareModuleInput:
    """All-gather a block's rows over tp: seq / tp -> seq.

    Decoder layers call attention by keyword and the MLP by position.
    """
    if "attention_mask" in block.forward.__code__.co_varnames:
        return PrepareModuleInput(
            input_kwarg_layouts={"hidden_states": Shard(1)},
            desired_input_kwarg_layouts={"hidden_states": Replicate()},
        )
    return PrepareModuleInput(input_layouts=Shard(1), desired_input_layouts=Replicate())


def check_whole_gradients(gradients: dict[str, torch.Tensor], group) -> bool:
    """Compare gradients that every tp rank holds whole; a difference stops the run.

    A parameter used inside a sharded region gets a partial gradient. When nobody sums
    it, the ranks drift apart silently; unequal gradients are the sign.

    Args:
        gradients: name -> this rank's gradient of a parameter not cut over tp.
        group: the tp process group.

    Returns:
        Whether there was something to compare: float16 may overflow at first.
    """
    if not gradients:
        return True
    flat = torch.cat([g.detach().float().flatten() for g in gradients.values()])
    low, high = flat.clone(), flat.clone()
    dist.all_reduce(low, dist.ReduceOp.MIN, group=group)
    dist.all_reduce(high, dist.ReduceOp.MAX, group=group)
    if not (low.isfinite().all() and high.isfinite().all()):
        return False
    sizes = [g.numel() for g in gradients.values()]
    for name, lowest, highest in zip(
        gradients, low.split(sizes), high.split(sizes), strict=True
    ):
        apart = (highest - lowest).abs().max()
        if apart > 1e-3 * torch.maximum(highest.abs(), lowest.abs()).max():
            raise PlanError(
                f"the gradient of {name!r} must be the same on every tp rank but "
                f"differs by {apart:.3g}: the plan leaves it partial; try tp_size=1"
            )
    return True


@torch.no_grad()
def probe(model: nn.Module) -> torch.Tensor:
    """The loss of a few fixed tokens, to tell whether a cut changed the model."""
    training, device = model.training, next(model.parameters()).device
    tokens = torch.arange(1, 17, device=device)[None]
    model.eval()
    loss = model(input_ids=tokens, labels=tokens, use_cache=False).loss
    model.train(training)
    return loss.float().cpu()


def check_same_function(
    before: torch.Tensor, after: torch.Tensor, allowed: float, described: str
) -> None:
    """Refuse a cut that passed all checks of names and shapes, but changes the numbers.

    Args:
        before, after: what ``probe`` gave before and after the cut.
        allowed: relative difference, rounding of the compute type.
    """
    apart = (after - before).abs()
    if apart > allowed * before or apart.isnan():
        raise PlanError(
            f"the model {described} must compute what it did before, but a loss of "
            f"{before:.6f} became {after:.6f}; try a partition_config, or tp_size=1"
        )
