"""The learning rate of each step: a function of the step, so that nothing is saved."""

from __future__ import annotations

import math

from tp2d_lib.config import TrainConfig


def learning_rate(step: int, total: int, config: TrainConfig) -> float:
    """The rate of a step, counted from 1: a linear warm-up, then the schedule.

    The curves are those of transformers' schedules, which begin the warm-up at zero.
    """
    warmup = config.warmup_steps
    if warmup < 1:
        warmup = math.ceil(warmup * total)
    if step <= warmup:
        return config.learning_rate * step / warmup
    done = (step - warmup - 1) / max(total - warmup, 1)
    curve = {
        "constant": 1.0,
        "linear": 1 - done,
        "cosine": (1 + math.cos(math.pi * done)) / 2,
    }[config.lr_scheduler_type]
    lowest = config.min_lr_ratio
    return config.learning_rate * (lowest + (1 - lowest) * curve)
