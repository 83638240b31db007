"""The figures that a run logs."""

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, Qwen2Config

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
