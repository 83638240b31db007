"""What a tensor-parallel plan does not shard: every tp rank computes it in full."""

from __future__ import annotations

from collections import defaultdict
from functools import wraps
from types import MethodType

from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate
from transformers.modeling_layers import GradientCheckpointingLayer

from tp2d_lib.fsdp.local import OnPlainTensors, shard
from tp2d_lib.model import PlanError, decoder_layers
from tp2d_lib.model.blocks import is_norm, pattern_of


def parent(name: str) -> str:
    return name.rpartition(".")[0]


def keys_of(model: nn.Module, styles: dict[str, str]) -> dict[str, str]:
    """For each module the pattern that means it, or its name if others differ."""
    blocks, kinds = set(map(parent, styles)), defaultdict(set)
    names = [name for name, _ in model.named_modules()]
    for name in names:
        kinds[pattern_of(name)].add((styles.get(name), name in blocks))
    patterns = {name: pattern_of(name) for name in names}
    return {k: p if len(kinds[p]) == 1 else k for k, p in patterns.items()}


def left_whole(model: nn.Module, styles: dict[str, str]) -> list[str]:
    """Parameters without a style, by name; embedding, head and norms have theirs."""
    ends = model.get_input_embeddings(), model.get_output_embeddings()
    left = []
    for name, _ in model.named_parameters():
        module = model.get_submodule(parent(name))
        if parent(name) not in styles and module not in ends and not is_norm(module):
            left.append(name)
    return left


def parts_left_whole(model: nn.Module, styles: dict[str, str]) -> list[str]:
    """The layers and the parts around them, if a parameter in them has no style.

    The list is empty, or begins with the layers.

    Raises:
        PlanError: names a parameter that is in no part of the model.
    """
    left = left_whole(model, styles)
    for name in left:
        if not parent(name):
            raise PlanError(
                f"the plan must cover every parameter, but leaves {name!r}; try "
                "tp_size=1"
            )
    layers = [*decoder_layers(model)]
    each = [name for name, module in model.named_modules() if module in layers]
    ends = model.get_input_embeddings(), model.get_output_embeddings()
    parts = [name for name, part in model.named_children() if part not in ends]
    return [*each, *parts] if left else []


def describe(model: nn.Module, styles: dict[str, str]) -> str:
    """For the log: what tp does not share out; nothing if it shares out all."""
    modules = dict.fromkeys(pattern_of(parent(n)) for n in left_whole(model, styles))
    first, more = list(modules)[:3], len(modules) - 3
    names = ", ".join(first) + f" and {more} more" * (more > 0)
    return f"; each tp rank computes {names} in full" * bool(modules)


class ComputeWhole(OnPlainTensors):
    """Compute a module's parameters that are not sharded on every tp rank.

    Its input and its output, (batch, seq, hidden), are the same everywhere, and so are
    their gradients: nothing is communicated.
    """

    def _apply(self, module: nn.Module, mesh: DeviceMesh) -> nn.Module:
        made, owners = {}, []
        for part in module.modules():
            for name, parameter in list(part.named_parameters(recurse=False)):
                if not isinstance(parameter, DTensor):
                    whole = made.get(parameter)
                    if whole is None:
                        whole = made[parameter] = shard(parameter, mesh, Replicate())
                    part.register_parameter(name, whole)
                    owners.append((part._parameters, name))
        forward = type(module).forward

        @wraps(forward)
        def on_plain_tensors(self, *args, **kwargs):
            kept = [parameters[name] for parameters, name in owners]
            for parameters, name in owners:
                parameters[name] = parameters[name].to_local()
            try:
                return forward(self, *args, **kwargs)
            finally:
                for (parameters, name), parameter in zip(owners, kept, strict=True):
                    parameters[name] = parameter

        if isinstance(module, GradientCheckpointingLayer):
            # Its class recomputes what a subclass calls forward, and nothing else.
            kind = type(module)
            members = {"forward": on_plain_tensors}
            module.__class__ = type(kind.__name__, (kind,), members)
        else:
            module.forward = MethodType(on_plain_tensors, module)
        return module
