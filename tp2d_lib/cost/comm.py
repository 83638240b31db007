"""What a step sends: measured on live ranks, and predicted by formula."""

from __future__ import annotations

from collections import defaultdict

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode  # has no public name

DP = ("dp", "dp_replicate", "dp_shard")  # all that counts as sent over dp
# Bytes a rank sends in a ring, per byte of the full tensor, times (n - 1) / n.
RING = {"all_gather": 1, "reduce_scatter": 1, "all_reduce": 2, "broadcast": 1}


class CommBytes(TorchDispatchMode):
    """Count collectives, and the bytes each rank sends in a ring algorithm.

    PyTorch's ``CommDebugMode`` counts too, but fails under DeepSpeed's hooks.
    ``rows`` maps (group name, collective) to [calls, bytes], where a group's name is
    its mesh dimension, such as "dp" or "tp", and "world" for all ranks.

    Args:
        mesh: the (dp, tp) mesh.
        model: with HSDP, the sharded model, whose mesh has the two dimensions of dp.
    """

    def __init__(self, mesh, model: nn.Module | None = None):
        super().__init__()
        weights = model.parameters() if model else ()
        meshes = [mesh, *(w.device_mesh for w in weights if isinstance(w, DTensor))]
        groups = {"world": dist.group.WORLD}
        for each in meshes:
            groups |= {name: each.get_group(name) for name in each.mesh_dim_names}
        self.groups = {
            key: (name, group.size())
            for name, group in groups.items()
            for key in keys(group)
        }
        self.rows = defaultdict(lambda: [0, 0])

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if any(map(is_wrapper, types)):
            return NotImplemented  # called again with what the wrapper holds
        out = func(*args, **(kwargs or {}))
        if kind := collective(func):
            name, size = self.group_of(args)
            full = max(tensor.nbytes for tensor in tensors((args, out)))
            row = self.rows[name, kind]
            row[0] += 1
            row[1] += round(RING[kind] * full * (size - 1) / size)
        return out

    def group_of(self, args) -> tuple[str, int]:
        """Name and size of the group an operator was given, by name or as an object."""
        for value in args:
            if isinstance(value, torch.ScriptObject) and "ProcessGroup" in str(value):
                value = keys(dist.ProcessGroup.unbox(value))[1]
            if isinstance(value, str | tuple) and value in self.groups:
                return self.groups[value]
        raise ValueError("the group of a collective must be in the mesh")

    def sent(self, *names: str) -> int:
        """Bytes one rank sent in the groups of these names."""
        return sum(row[1] for (group, _), row in self.rows.items() if group in names)


def keys(group) -> tuple[str, tuple[int, ...]]:
    """The two keys of a group: its name and, for groups made elsewhere, its ranks."""
    return group.group_name, tuple(dist.get_process_group_ranks(group))


def collective(func) -> str | None:
    """The kind of collective an operator is, or None."""
    if getattr(func, "namespace", "") not in ("c10d", "_c10d_functional"):
        return None
    name = func.__name__.replace("_", "")
    for kind in RING:
        if kind.replace("_", "") in name:
            return kind
    return None


def is_wrapper(kind: type) -> bool:
    """Whether tensors of this type, such as DTensor, have no memory of their own."""
    return hasattr(kind, "__tensor_flatten__")


def tensors(value) -> list[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        return [value]
    if isinstance(value, list | tuple):
        return [tensor for item in value for tensor in tensors(item)]
    return []


def fsdp_bytes(
    parameters: int,
    tp_size: int,
    dp_size: int,
    itemsize: int = 2,
    micro_batches: int = 1,
    stays_gathered: bool = False,
) -> float:
    """Bytes a rank sends over dp in one step of ``fully_shard``.

    Each micro-batch gathers the weights for forward and again for backward, in the
    compute type, and reduce-scatters the gradients in float32:
    parameters / tp * (2 * itemsize + 4) * (dp - 1) / dp. A model that is too small for
    a second group ``stays_gathered`` in between, and is gathered once.
    """
    gathers = 1 if stays_gathered else 2
    ring = (dp_size - 1) / dp_size
    return micro_batches * parameters / tp_size * (gathers * itemsize + 4) * ring


def zero_bytes(
    parameters: int,
    stage: int,
    tp_size: int,
    dp_size: int,
    itemsize: int = 2,
    stays_gathered: bool = False,
) -> float:
    """Bytes a rank sends over dp in a step of one micro-batch, with DeepSpeed's ZeRO.

    Gradients are all-reduced in float32 at stages 0 to 2, reduce-scattered at stage 3.
    Stages 1 and 2 then all-gather the updated weights. Stage 3 gathers weights instead,
    for forward and again for backward; once if the model ``stays_gathered`` in between,
    because it is smaller than ``stage3_max_live_parameters``. Stages 2 and 3 send this
    again for each further micro-batch, except for the gather of stage 2.
    """
    gathers = (0, 1, 1, 1 if stays_gathered else 2)[stage]
    reduced = 4 * (1 if stage == 3 else 2)
    ring = (dp_size - 1) / dp_size
    return parameters / tp_size * (gathers * itemsize + reduced) * ring


def tp_bytes(
    layers: int,
    hidden: int,
    tokens: float,
    tp_size: int,
    itemsize: int = 2,
    columns: int = 2,
) -> float:
    """Bytes a rank sends over tp in the layers of one step.

    Attention and MLP each need one all-reduce of (tokens, hidden) in forward, or an
    all-gather and a reduce-scatter, which send as much. In backward each needs another;
    AutoTP needs one for each of a layer's ``columns``, its column-parallel weights:
    layers * (2 + columns) * tokens * hidden * itemsize * 2 * (tp - 1) / tp.
    Embedding and loss are not counted; ``tokens`` is what a dp rank reads in a step.
    """
    ring = (tp_size - 1) / tp_size
    return layers * (2 + columns) * tokens * hidden * itemsize * 2 * ring
