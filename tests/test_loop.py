"""The learning-rate schedule, and the figures a run logs."""

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    Qwen2Config,
    get_cosine_schedule_with_warmup,
)

from tp2d_lib.loop import learning_rate
from tp2d_lib.metrics import flops_per_token
from tp2d_lib.presets import build_config


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    return build_config("demo", str(tmp_path_factory.mktemp("storage")))


def rates(config, total, **settings):
    from dataclasses import replace

    config = replace(config, learning_rate=1.0, **settings)
    return [learning_rate(step, total, config) for step in range(1, total + 1)]


def test_warm_up_is_linear_and_reaches_the_peak(config):
    got = rates(config, 100, warmup_ratio=0.1, lr_scheduler_type="constant")
    assert got[:10] == pytest.approx([step / 10 for step in range(1, 11)])
    assert got[10:] == [1.0] * 90


def test_cosine_is_the_one_of_transformers(config):
    """After the warm-up; in it, theirs wastes the first step on a rate of zero."""
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
    schedule = get_cosine_schedule_with_warmup(optimizer, 10, 100)
    expected = []
    for _ in range(100):
        expected.append(schedule.get_last_lr()[0])
        optimizer.step()
        schedule.step()
    got = rates(config, 100, warmup_ratio=0.1, lr_scheduler_type="cosine")
    assert got[10:] == pytest.approx(expected[10:])
    assert 0 < got[-1] < 0.01


def test_no_warm_up(config):
    assert rates(config, 5, warmup_ratio=0.0, lr_scheduler_type="constant") == [1.0] * 5


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
