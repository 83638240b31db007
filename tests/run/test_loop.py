"""When the loop saves, and the learning-rate schedule."""

from dataclasses import replace

import pytest
import torch
from transformers import (
    get_cosine_with_min_lr_schedule_with_warmup,
    get_linear_schedule_with_warmup,
)

from tp2d_lib.presets import build_config
from tp2d_lib.run.loop import SaveSchedule
from tp2d_lib.run.schedule import learning_rate


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    return build_config("demo", str(tmp_path_factory.mktemp("storage")))


def rates(config, total, **settings):
    config = replace(config, learning_rate=1.0, **settings)
    return [learning_rate(step, total, config) for step in range(1, total + 1)]


def test_warm_up_is_linear_and_reaches_the_peak(config):
    got = rates(config, 100, warmup_steps=0.1, lr_scheduler_type="constant")
    assert got[:10] == pytest.approx([step / 10 for step in range(1, 11)])
    assert got[10:] == [1.0] * 90


SCHEDULES = {
    "cosine": get_cosine_with_min_lr_schedule_with_warmup,
    "linear": get_linear_schedule_with_warmup,
}


@pytest.mark.parametrize("lowest", [0.0, 0.1])
@pytest.mark.parametrize("name", SCHEDULES)
def test_schedules_are_those_of_transformers(config, name, lowest):
    """After the warm-up; in it, theirs wastes the first step on a rate of zero."""
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
    settings = {"num_warmup_steps": 10, "num_training_steps": 100}
    if name == "cosine":
        settings |= {"min_lr_rate": lowest}
    schedule = SCHEDULES[name](optimizer, **settings)
    expected = []
    for _ in range(100):
        rate = schedule.get_last_lr()[0]
        expected.append(lowest + (1 - lowest) * rate if name == "linear" else rate)
        optimizer.step()
        schedule.step()
    own = {"lr_scheduler_type": name, "min_lr_ratio": lowest}
    got = rates(config, 100, warmup_steps=0.1, **own)
    assert got[10:] == pytest.approx(expected[10:])
    assert rates(config, 100, warmup_steps=10, **own) == got
    assert lowest < got[-1] < lowest + 0.02


def test_short_runs_have_a_rate(config):
    """Whatever the fractions: each step has one, and the first is not zero."""
    for name in (*SCHEDULES, "constant"):
        for total in range(1, 6):
            for warmup in (0, 1, 3, 9):
                own = {"warmup_steps": warmup, "lr_scheduler_type": name}
                got = rates(config, total, **own)
                assert all(0 < rate <= 1 for rate in got), (name, total, warmup)


def test_no_warm_up(config):
    assert rates(config, 5, warmup_steps=0.0, lr_scheduler_type="constant") == [1.0] * 5


def saves(config, steps, step_s, save_s, **settings):
    """The steps after which a run saves, on a clock of our own."""
    schedule, now, saved = SaveSchedule(replace(config, **settings)), 100.0, []
    for step in range(1, steps + 1):
        due = schedule.is_due(step, now)
        now += step_s + (save_s(step) if due else 0)
        saved += [step] * due
    return saved


def at_once(step):
    return 0


BY_TIME = {"checkpoint_every": 0, "checkpoint_minutes": 1.0}


def test_saves_by_steps_by_time_or_by_whichever_comes_first(config):
    assert saves(config, 20, 10, at_once, **BY_TIME) == [7, 14]
    by_steps = {"checkpoint_every": 4, "checkpoint_minutes": 0.0}
    assert saves(config, 9, 10, at_once, **by_steps) == [4, 8]
    both = {"checkpoint_every": 10, "checkpoint_minutes": 1.0}
    assert saves(config, 20, 10, at_once, **both) == [7, 10, 17, 20]
    neither = {"checkpoint_every": 0, "checkpoint_minutes": 0.0}
    assert saves(config, 20, 10, at_once, **neither) == []
    assert saves(config, 20, 0, at_once, **BY_TIME) == []  # no driver, no clock


def test_saves_by_time_cost_no_more_than_training(config):
    """But for the first, whose price nobody knows; a quick one shortens it again."""
    got = saves(config, 200, 10, lambda step: 300, **BY_TIME)
    assert got[:3] == [7, 39, 71]
    assert (len(got) - 1) * 300 <= 200 * 10
    got = saves(config, 50, 10, lambda step: 300 if step == 7 else 0, **BY_TIME)
    assert got == [7, 39, 46]
