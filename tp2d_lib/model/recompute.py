"""Activations that are computed again in backward instead of being stored."""

from __future__ import annotations

import torch
import torch.nn.attention.varlen  # registers the operator below
from torch import nn
from torch.utils._pytree import tree_leaves  # has no public name
from torch.utils.checkpoint import (
    CheckpointPolicy,
    SelectiveCheckpointContext,
    create_selective_checkpoint_contexts,
)

from tp2d_lib.config import ConfigError, TrainConfig
from tp2d_lib.model.guards import PlanError

aten = torch.ops.aten
PRODUCTS = {aten.mm.default, aten.addmm.default}
ATTENTION = {
    aten._scaled_dot_product_cudnn_attention.default,
    aten._scaled_dot_product_efficient_attention.default,
    aten._scaled_dot_product_flash_attention.default,
    aten._scaled_dot_product_flash_attention_for_cpu.default,
    torch.ops.torch_attn._varlen_attn.default,
}


def checkpoint_activations(model: nn.Module, config: TrainConfig) -> None:
    """Recompute each layer in backward, whole or but for what is costly to compute."""
    if config.activation_checkpointing == "none":
        return
    options = {"use_reentrant": False}
    if config.activation_checkpointing == "selective":
        hidden, tp_size = model.config.hidden_size, config.tp_size
        options["context_fn"] = lambda: create_selective_checkpoint_contexts(
            KeepCostly(hidden, tp_size)
        )
    name = "activation_checkpointing_enable"
    old = "gradient_checkpointing_enable"  # transformers 5.20
    getattr(model, name if hasattr(model, name) else old)(options)


def check_recomputed(model: nn.Module, config: TrainConfig) -> None:
    """Refuse, in the driver, a model whose layers transformers cannot recompute.

    Raises:
        ConfigError: ``activation_checkpointing`` is not "none".
    """
    chosen = config.activation_checkpointing
    if chosen != "none" and not model.supports_gradient_checkpointing:
        raise ConfigError(
            f"activation_checkpointing={chosen!r} works only with models that "
            f"transformers can recompute layer by layer, not {type(model).__name__}; "
            "try activation_checkpointing='none'"
        )


class KeepCostly:
    """Of one layer, keep attention's output and the products that a block begins with.

    A block's last product is computed again, if backward needs it: the ranks' parts of
    it are as wide as their sum, and DeepSpeed writes the sum over them. PyTorch notices
    an operator that writes over what is kept, unless it does so through some views, and
    would then apply it a second time in backward.
    """

    def __init__(self, hidden: int, tp_size: int):
        self.hidden, self.tp_size = hidden, tp_size
        self.kept: set[int] = set()  # storages, which exist as long as this object

    def __call__(
        self, context: SelectiveCheckpointContext, operator, *args, **kwargs
    ) -> CheckpointPolicy:
        self.check(operator, args, kwargs)
        if not (operator in ATTENTION or self.starts_block(operator, args)):
            return CheckpointPolicy.PREFER_RECOMPUTE
        self.kept |= storages(getattr(context, "op_output", None))  # torch 2.11: none
        return CheckpointPolicy.MUST_SAVE

    def starts_block(self, operator, args: tuple) -> bool:
        if operator not in PRODUCTS:
            return False
        x, weight = args[-2:]  # addmm's bias comes first
        is_part = self.tp_size > 1 and weight.shape[-1] == self.hidden
        return x.shape[-1] == self.hidden and not is_part

    def check(self, operator, args: tuple, kwargs: dict) -> None:
        if not operator._schema.is_mutable:
            return
        arguments = operator._schema.arguments
        given = dict(zip([a.name for a in arguments], args, strict=False)) | kwargs
        written = [given.get(a.name) for a in arguments if a.alias_info]
        if self.kept & storages(written):
            raise PlanError(
                "activation_checkpointing='selective' works only with models that do "
                f"not write over a product, but {operator} does; try 'full'"
            )


def storages(value) -> set[int]:
    """Addresses of the storages in a value, such as the arguments of an operator."""
    return {
        tensor.untyped_storage()._cdata
        for tensor in tree_leaves(value)
        if isinstance(tensor, torch.Tensor)
        and not hasattr(tensor, "__tensor_flatten__")
    }
