"""The (dp, tp) device mesh, and the only rank arithmetic in the project."""

from __future__ import annotations

import os
import socket
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

PATIENCE = timedelta(hours=12)  # the ranks' own group would give up in minutes


@dataclass(frozen=True)
class Coordinate:
    """The position of one world rank in the mesh."""

    rank: int
    dp_rank: int
    tp_rank: int


def patient_group() -> dist.ProcessGroup:
    """All ranks in another group, on CPUs, for what may take hours: to load, to write.

    Training must not share one with threads.
    """
    return dist.new_group(backend="gloo", timeout=PATIENCE)


def layout(dp_size: int, tp_size: int) -> torch.Tensor:
    """World ranks as a (dp_size, tp_size) table: a row is one TP group.

    Neighboring ranks share a row, so that a TP group, which communicates in every
    layer, stays inside one node when ranks are numbered node by node.
    """
    return torch.arange(dp_size * tp_size).view(dp_size, tp_size)


def coordinates(dp_size: int, tp_size: int) -> list[Coordinate]:
    """The coordinate of every world rank, in rank order."""
    table = layout(dp_size, tp_size)
    return [
        Coordinate(int(table[dp_rank, tp_rank]), dp_rank, tp_rank)
        for dp_rank in range(dp_size)
        for tp_rank in range(tp_size)
    ]


def build_mesh(dp_size: int, tp_size: int, device_type: str = "auto") -> DeviceMesh:
    """Build the two-dimensional mesh over an initialized process group.

    Args:
        dp_size: rows; each row reads different data.
        tp_size: columns; the ranks of a row hold different shards of every layer.
        device_type: "cuda", "cpu", or "auto" for what this machine has.

    Returns:
        A mesh of shape (dp_size, tp_size) with the names ("dp", "tp").
    """
    if device_type == "auto":
        device_type = "cuda" if torch.cuda.is_available() else "cpu"
    if device_type == "cuda":  # launchers expose all GPUs to a rank, or only its own
        local_rank = int(os.environ.get("LOCAL_RANK", 0))
        torch.cuda.set_device(local_rank % torch.cuda.device_count())
    mesh = init_device_mesh(
        device_type, (dp_size, tp_size), mesh_dim_names=("dp", "tp")
    )
    assert torch.equal(mesh.mesh.cpu(), layout(dp_size, tp_size).to(mesh.mesh.dtype))
    return mesh


def split_dp(mesh: DeviceMesh, dp_replicate_size: int) -> DeviceMesh:
    """The mesh to shard weights on: with HSDP, dp becomes dp_replicate x dp_shard.

    Neighboring ranks shard one copy of the model, so that it stays inside a node, as a
    TP group does; only sums of gradients are sent between copies.

    Args:
        mesh: of shape (dp_size, tp_size), as built by ``build_mesh``.
        dp_replicate_size: copies of the model; it divides dp_size.

    Returns:
        ``mesh`` itself for one copy; otherwise one with the names ("dp_replicate",
        "dp_shard", "tp"), of shape (dp_replicate_size, dp_size / dp_replicate_size,
        tp_size).
    """
    if dp_replicate_size == 1:
        return mesh
    sizes = (dp_replicate_size, mesh["dp"].size() // dp_replicate_size)
    # No public name yet; by number, because torch 2.11 refuses the name "dp".
    return mesh._unflatten(0, sizes, ("dp_replicate", "dp_shard"))


def is_first_on_node() -> bool:
    return int(os.environ.get("LOCAL_RANK", "0")) == 0


def made_by_nodes(
    folder: Path | None, error: str | None, group: dist.ProcessGroup | None = None
) -> tuple[dict[str, Path], str | None]:
    """What the first rank of each node has made; every rank must call it.

    Args:
        folder, error: on such a rank, what it made, or why it could not.

    Returns:
        The folders by host, and the first error if there is one; the same on all ranks.
    """
    answers = [None] * dist.get_world_size(group)
    mine = (socket.gethostname(), folder, error)
    dist.all_gather_object(answers, mine, group=group)
    folders = {host: folder for host, folder, _ in answers if folder}
    return folders, next((error for _, _, error in answers if error), None)
