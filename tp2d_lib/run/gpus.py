"""What GPUs can do, from their makers' data sheets."""

from __future__ import annotations

import re
from typing import NamedTuple

import torch


class Gpu(NamedTuple):
    """One GPU: dense bf16 peak in FLOP/s, memory in bytes, and bytes/s.

    ``bandwidth`` is that of its memory, ``link`` that to other GPUs of its node in one
    direction, by NVLink or else by PCIe.
    """

    flops: float
    memory: float
    bandwidth: float
    link: float


# The first whose words are all in a GPU's name; without PCIe or NVL it is one on an
# SXM board.
GPUS = {
    "H100 PCIe": Gpu(756e12, 80e9, 2.0e12, 64e9),
    "H100 NVL": Gpu(835e12, 94e9, 3.9e12, 64e9),
    "H200 NVL": Gpu(835e12, 141e9, 4.8e12, 450e9),
    "H200": Gpu(989e12, 141e9, 4.8e12, 450e9),
    "GH200": Gpu(989e12, 96e9, 4.0e12, 450e9),
    "H800 PCIe": Gpu(756e12, 80e9, 2.0e12, 64e9),
    "H800": Gpu(989e12, 80e9, 3.35e12, 200e9),
    "H100": Gpu(989e12, 80e9, 3.35e12, 450e9),
    "H20": Gpu(148e12, 96e9, 4.0e12, 450e9),
    "B200": Gpu(2250e12, 180e9, 8.0e12, 900e9),
    "B300": Gpu(2250e12, 270e9, 8.0e12, 900e9),
    "GB200": Gpu(2500e12, 186e9, 8.0e12, 900e9),
    "A100 PCIE 40GB": Gpu(312e12, 40e9, 1.555e12, 32e9),
    "A100 PCIE": Gpu(312e12, 80e9, 1.935e12, 32e9),
    "A100 40GB": Gpu(312e12, 40e9, 1.555e12, 300e9),
    "A100": Gpu(312e12, 80e9, 2.0e12, 300e9),
    "A10G": Gpu(70e12, 24e9, 0.6e12, 32e9),
    "A10": Gpu(125e12, 24e9, 0.6e12, 32e9),
    "L40S": Gpu(362e12, 48e9, 0.864e12, 32e9),
    "L40": Gpu(181e12, 48e9, 0.864e12, 32e9),
    "L4": Gpu(121e12, 24e9, 0.3e12, 32e9),
}


def find(name: str) -> Gpu | None:
    """The GPU of this name, such as "H100" or "NVIDIA A100-SXM4-80GB", if known.

    A slice of one, by MIG or as a vGPU such as "GRID A100-10C", is not.
    """
    words = set(re.findall(r"\w+", name.lower()))
    if "mig" in words or any(re.fullmatch(r"\d+[abcq]", word) for word in words):
        return None
    known = (g for key, g in GPUS.items() if words.issuperset(key.lower().split()))
    return next(known, None)


def peak_flops(device: torch.device) -> float | None:
    """Peak FLOP/s of this GPU, or None if it is unknown, or on a CPU."""
    if device.type != "cuda":
        return None
    gpu = find(torch.cuda.get_device_name(device))
    return gpu and gpu.flops
