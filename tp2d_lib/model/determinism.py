"""Deterministic algorithms only: the same run then computes the same bits on GPUs."""

from __future__ import annotations

import os

import torch

DEFAULTS = {
    "CUBLAS_WORKSPACE_CONFIG": ":4096:8",  # NVIDIA's advice for several streams
    "NCCL_ALGO": "^NVLS",  # the switch of the NVLink network sums in any order
    "TORCHINDUCTOR_DETERMINISTIC": "1",  # torch.compile times no kernels to choose one
}


def environment() -> dict[str, str]:
    """What cuBLAS, NCCL and the compiler read when they start; values set are kept."""
    return {name: os.environ.get(name, value) for name, value in DEFAULTS.items()}


def enforce() -> None:
    """Make this process use deterministic algorithms; where there is none, fail.

    Call it before the first computation on a GPU. The strict mode also decides how
    ``scaled_dot_product_attention`` computes gradients: FlashAttention and the
    memory-efficient kernel then sum in a fixed order, which is not their default, and
    cuDNN's kernel, which cannot, is not used (see "Reproducibility" in PyTorch's
    documentation, and ``sdp_utils.cpp``).
    """
    os.environ.update(environment())
    torch.backends.cudnn.benchmark = False
    torch.backends.cudnn.deterministic = True
    torch.use_deterministic_algorithms(True)
