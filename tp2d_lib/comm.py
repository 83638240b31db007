"""What a step sends: measured on live ranks, and predicted by formula."""

from __future__ import annotations

from collections import defaultdict

import torch
import torch.distributed as dist
from torch.distributed.tensor.debug import CommDebugMode

# Bytes a rank sends in a ring, per byte of the whole tensor, times (n - 1) / n.
RING = {"all_gather": 1, "reduce_scatter": 1, "all_reduce": 2}


class CommBytes(CommDebugMode):
    """Count collectives, and the bytes each rank sends in a ring algorithm.

    ``rows`` maps (group name, collective) to [calls, bytes], where a group's name is
    its mesh dimension, "dp" or "tp", and "world" for all ranks.
    """

    def __init__(self, mesh):
        super().__init__()
        groups = {"world": dist.group.WORLD}
        groups |= {name: mesh.get_group(name) for name in mesh.mesh_dim_names}
        self.groups = {g.group_name: (name, g.size()) for name, g in groups.items()}
        self.rows = defaultdict(lambda: [0, 0])

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = super().__torch_dispatch__(func, types, args, kwargs)
        kind = collective(func)
        if kind and out is not NotImplemented:
            name, size = self.group_of(args)
            whole = max(tensor.nbytes for tensor in tensors((args, out)))
            row = self.rows[name, kind]
            row[0] += 1
            row[1] += round(RING[kind] * whole * (size - 1) / size)
        return out

    def group_of(self, args) -> tuple[str, int]:
        """Name and size of the group an operator was given, by name or as an object."""
        for value in args:
            if isinstance(value, torch.ScriptObject) and "ProcessGroup" in str(value):
                value = dist.ProcessGroup.unbox(value).group_name
            if isinstance(value, str) and value in self.groups:
                return self.groups[value]
        raise ValueError("a collective on a group that is not in the mesh")

    def sent(self, name: str) -> int:
        """Bytes one rank sent in the groups of this name."""
        return sum(row[1] for (group, _), row in self.rows.items() if group == name)


def collective(func) -> str | None:
    """The kind of collective an operator is, or None."""
    if func.namespace not in ("c10d", "_c10d_functional"):
        return None
    name = func.__name__.replace("_", "")
    for kind in RING:
        if kind.replace("_", "") in name:
            return kind
    return None


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
) -> float:
    """Bytes a rank sends over dp in one step of ``fully_shard``.

    Each micro-batch gathers the weights for forward and again for backward, in the
    compute type, and reduce-scatters the gradients in float32:
    parameters / tp * (2 * itemsize + 4) * (dp - 1) / dp.
    """
    ring = (dp_size - 1) / dp_size
    return micro_batches * parameters / tp_size * (2 * itemsize + 4) * ring


def tp_bytes(
    layers: int, hidden: int, tokens: float, tp_size: int, itemsize: int = 2
) -> float:
    """Bytes a rank sends over tp in the layers of one step.

    Attention and MLP each pay an all-gather and a reduce-scatter of (tokens, hidden),
    together one all-reduce, in forward and again in backward:
    layers * 2 blocks * 2 passes * tokens * hidden * itemsize * 2 * (tp - 1) / tp.
    Embedding and loss come on top; ``tokens`` is what a dp rank reads in a step.
    """
    ring = (tp_size - 1) / tp_size
    return layers * 2 * 2 * tokens * hidden * itemsize * 2 * ring


def crossing_tokens(
    parameters: int, layers: int, hidden: int, tp_size: int, dp_size: int
) -> float:
    """Tokens a dp rank reads in a micro-batch at which both send the same (bf16)."""
    per_token = tp_bytes(layers, hidden, 1, tp_size)
    return fsdp_bytes(parameters, tp_size, dp_size) / per_token
