"""The figures that a run logs."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, Qwen2Config

from tp2d_lib.monitor import gpus
from tp2d_lib.monitor.metrics import flops_per_token


@pytest.mark.parametrize("kind", [Qwen2Config, LlamaConfig])
@pytest.mark.parametrize("tied", [True, False])
def test_flops_count_what_multiplies(kind, tied):
    """6 per weight of every linear layer and the head, plus attention's products."""
    sizes = kind(
        vocab_size=100,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=tied,
    )
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(sizes)
    linear = sum(
        module.weight.numel()
        for module in model.modules()
        if isinstance(module, torch.nn.Linear)
    )
    attention = 12 * 2 * 32 * 64
    expected = 6 * linear + attention
    assert flops_per_token(model, 64) == pytest.approx(expected, rel=0.03)


@pytest.mark.parametrize(
    ("name", "peak"),
    [
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA H100 NVL", 835e12),
        ("NVIDIA H200", 989e12),
        ("NVIDIA L40", 181e12),
        ("NVIDIA L4", 121e12),
        ("NVIDIA RTX A1000", None),  # no A100
    ],
)
def test_a_gpu_is_known_by_its_whole_name(name, peak, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    assert gpus.peak_flops(torch.device("cuda")) == peak


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux")
def test_the_peak_is_not_that_of_the_parent():
    code = (
        "import torch; from tp2d_lib.monitor.metrics import peak_memory; "
        "print(peak_memory(torch.device('cpu')))"
    )
    large = np.ones(2**27)  # 1 GiB
    child = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, check=True
    )
    assert int(child.stdout) < large.nbytes
