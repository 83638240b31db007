"""The training loop: one, for every engine."""

from __future__ import annotations

import math

from tp2d_lib import checkpoint, progress
from tp2d_lib.config import TrainConfig
from tp2d_lib.data import BatchLoader
from tp2d_lib.metrics import Metrics


def run(engine, loader: BatchLoader, config: TrainConfig) -> None:
    """Train from the last checkpoint, or from the start, to the end of the data."""
    state = checkpoint.restore(engine, config)
    loader.position = state["position"]
    start, total = state["step"], state["step"] + loader.steps_left
    publish = progress.publisher(config.run_name)
    publish({"notice": engine.notice})
    publish({"start": start, "total": total})
    metrics = Metrics(engine, config, start, state["history"], publish)
    for step, batch in enumerate(loader, start=start + 1):
        rate = learning_rate(step, total, config)
        for group in engine.optimizer.param_groups:
            group["lr"] = rate
        loss, grad_norm = engine.step(batch)
        metrics.add(batch, loss, grad_norm)
        last = step == total
        save = last or (config.checkpoint_every and step % config.checkpoint_every == 0)
        if save or step % config.log_interval == 0:  # no step is left unlogged
            metrics.log(step, rate, loader.position)
        if save:
            state = {"step": step, "position": loader.position}
            state["history"] = metrics.history
            checkpoint.commit(engine, state, config)
            metrics.reset()  # saving is not training: leave it out of the speed
    metrics.close()
    if config.export_to:
        engine.export(config.export_to)


def learning_rate(step: int, total: int, config: TrainConfig) -> float:
    """The rate of a step, counted from 1: linear warm-up, then cosine to 0 or constant.

    A function of the step alone, so that a resumed run needs no scheduler state.
    """
    warmup = math.ceil(config.warmup_ratio * total)
    if step <= warmup:
        return config.learning_rate * step / warmup
    if config.lr_scheduler_type == "constant":
        return config.learning_rate
    done = (step - warmup - 1) / max(total - warmup, 1)
    return config.learning_rate * (1 + math.cos(math.pi * done)) / 2
