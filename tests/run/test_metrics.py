"""The figures that a run logs."""

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, MixtralConfig, Qwen2Config

from tests.support.demo import make_config
from tp2d_lib import data
from tp2d_lib.run import gpus
from tp2d_lib.run.metrics import flops_per_token


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


def test_a_token_visits_some_experts():
    """Two of eight cost as much as if there were no others."""
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4}
    sizes |= {"num_key_value_heads": 2, "num_hidden_layers": 2, "vocab_size": 100}
    with torch.device("meta"):
        eight, two = (
            AutoModelForCausalLM.from_config(
                MixtralConfig(num_local_experts=n, num_experts_per_tok=2, **sizes)
            )
            for n in (8, 2)
        )
    expected = flops_per_token(two, 64)
    assert flops_per_token(eight, 64) == pytest.approx(expected, rel=0.05)


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
        ("NVIDIA A100-SXM4-80GB MIG 1g.10gb", None),
        ("NVIDIA H100 80GB HBM3 MIG 3g.40gb", None),
        ("GRID A100-10C", None),
        ("NVIDIA GH200 480GB", 989e12),
        ("NVIDIA H800", 989e12),
        ("NVIDIA H800 PCIe", 756e12),
        ("NVIDIA B200", 2250e12),
        ("NVIDIA B300 SXM6 AC", 2250e12),
        ("NVIDIA GB200", 2500e12),
        ("NVIDIA RTX PRO 6000 Blackwell Server Edition", None),
        ("Tesla T4", None),  # it has no bfloat16
    ],
)
def test_a_gpu_is_known_by_its_whole_name(name, peak, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    assert gpus.peak_flops(torch.device("cuda")) == peak


def logged(config):
    """Run by every rank: a record of two steps that were not computed."""
    from tp2d_lib.data import build_dataloader
    from tp2d_lib.fsdp import build_engine
    from tp2d_lib.mesh import build_mesh
    from tp2d_lib.run.metrics import Metrics

    mesh = build_mesh(config.dp_size, config.tp_size, "cpu")
    loader, history = build_dataloader(config, mesh), []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gpus, "peak_flops", lambda device: 1e12)
        metrics = Metrics(build_engine(config, mesh), config, 0, history, print)
        for _, batch in zip(range(2), loader, strict=False):
            metrics.add(batch, torch.ones(()), torch.ones(()))
        valid = int(metrics.valid)
        metrics.log(2, 0.1, loader)
    return history[0], metrics.flops, valid


def test_padding_is_no_work(demo_paths, tmp_path, pools):
    """A row of n tokens predicts n - 1; what follows them is padding."""
    config = make_config(demo_paths, tmp_path, 1, 1, pack="none", device="cpu")
    config = replace(config, prepared_data=str(data.prepare(config)))
    ((record, flops, valid),) = pools(1).run(logged, config)
    rows = 2 * config.global_batch_size
    assert valid + rows < 0.8 * rows * config.seq_length  # the rest is padding
    per_second = record["tokens_per_second"] * (valid + rows) / valid
    assert record["mfu"] == pytest.approx(per_second * flops / 1e12)


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux")
def test_the_peak_is_not_that_of_the_parent():
    code = (
        "import torch; from tp2d_lib.run.metrics import peak_memory; "
        "print(peak_memory(torch.device('cpu')))"
    )
    large = np.ones(2**27)  # 1 GiB
    child = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, check=True
    )
    assert int(child.stdout) < large.nbytes
