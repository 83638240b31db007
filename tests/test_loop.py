"""The learning-rate schedule."""

from dataclasses import replace

import pytest
import torch
from transformers import get_cosine_schedule_with_warmup

from tp2d_lib.loop import learning_rate
from tp2d_lib.presets import build_config


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    return build_config("demo", str(tmp_path_factory.mktemp("storage")))


def rates(config, total, **settings):
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
