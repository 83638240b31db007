"""How long a step takes on GPUs: an estimate from what it computes and sends."""

from __future__ import annotations

from dataclasses import dataclass

from tp2d_lib.run.gpus import Gpu

# Chosen by the published runs in lessons/published.py, which the estimate meets within
# 15%.
LINK, NETWORK = 0.7, 0.8  # of a link's peak that NCCL reaches, in and between nodes
EXPOSED = 0.25  # of the traffic over dp; the rest hides behind computation, if it fits


@dataclass(frozen=True)
class Cluster:
    """Nodes of equal GPUs.

    Args:
        gpu: of its data sheet.
        gpus_per_node: ranks are placed node by node, and a tp group side by side.
        network: between nodes, in bytes/s of a GPU in one direction; 50e9 is 400 Gb/s.
        switched: whether a GPU reaches each neighbor at full speed. Boards of four
            H100 or H200 have no switch: a third of the links leads to each neighbor.
        use: the part of the GPU's peak that computation reaches. Measure it on one
            GPU; with everything compiled, large models reach 0.5 to 0.7.
    """

    gpu: Gpu
    gpus_per_node: int = 8
    network: float = 50e9
    switched: bool = True
    use: float = 0.5

    def speed(self, ranks: int, apart: int = 1) -> float:
        """Bytes/s that a rank sends to the next in a group, ``apart`` ranks away."""
        if ranks * apart > self.gpus_per_node:
            return NETWORK * self.network
        reached = 1 if self.switched else (ranks - 1) / (self.gpus_per_node - 1)
        return LINK * self.gpu.link * reached


def step_seconds(
    cluster: Cluster,
    tp_size: int,
    dp_size: int,
    flops: float,
    tp: float,
    dp: float,
    copied: float = 0.0,
    exposed: float = EXPOSED,
) -> float:
    """Seconds of one step: computation, traffic over tp, and what shows of dp's.

    Args:
        flops: floating-point operations of one rank, with recomputation.
        tp: bytes that a rank sends over tp, of which nothing is hidden.
        dp: bytes that a rank sends over dp.
        copied: bytes that sending over tp reads and writes in a GPU's own memory: what
            is gathered along a tensor's second dimension is put in place by a copy.
        exposed: the part of ``dp`` that computation does not hide, however much of it
            there is.
    """
    compute = seconds = flops / (cluster.use * cluster.gpu.flops)
    if tp_size > 1:
        seconds += tp / cluster.speed(tp_size) + copied / cluster.gpu.bandwidth
    if dp_size > 1:
        sending = dp / cluster.speed(dp_size, apart=tp_size)
        seconds += max(exposed * sending, sending - compute)
    return seconds
