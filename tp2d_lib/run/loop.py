"""The training loop, one for every engine."""

from __future__ import annotations

from collections.abc import Callable

import torch.distributed as dist

from tp2d_lib import checkpoint
from tp2d_lib.config import TrainConfig
from tp2d_lib.data import BatchLoader
from tp2d_lib.model.attention import check_apart
from tp2d_lib.run import card, health, progress
from tp2d_lib.run.evaluate import evaluate
from tp2d_lib.run.metrics import Metrics
from tp2d_lib.run.schedule import learning_rate


def run(
    engine,
    loader: BatchLoader,
    config: TrainConfig,
    schedule: Callable[[int, int, TrainConfig], float] = learning_rate,
    on_step_end: Callable[..., dict[str, float] | None] | None = None,
    on_log: Callable[[dict[str, float]], None] | None = None,
) -> None:
    """Train from the latest checkpoint, or from the start, to the end of the data.

    When the driver requests a stop, the current step is the last one and is saved.

    Args:
        schedule: the learning rate of a step, counted from 1, of so many. A group of
            the optimizer may have an ``lr_scale`` and a ``weight_decay_scale``.
        on_step_end: called on every rank after each step; the numbers that it returns
            on rank 0 are logged to TensorBoard.
        on_log: called on rank 0 with each log record, as soon as there is one.
    """
    driver = progress.WorkerProgress(config.run_name)
    state = checkpoint.restore(engine, config, driver.notify)
    loader.step, loader.position = state["step"], state["position"]
    start, total = state["step"], state["step"] + loader.steps_left
    driver.notify(engine.notice)
    if config.pack == "documents":
        check_apart(engine, config)
    driver.publish({"start": start, "total": total, "restored": state["restored"]})
    step = start

    def publish(record: dict) -> None:
        driver.publish(record)
        if on_log and "step" in record and dist.get_rank() == 0:
            with driver.during("on_log"):
                on_log(dict(record))

    metrics = Metrics(engine, config, start, state["history"], publish)
    saving = SaveSchedule(config)
    for step, batch in enumerate(loader, start=start + 1):
        driver.begin(step)
        rate = schedule(step, total, config)
        for group in engine.optimizer.param_groups:
            group["lr"] = rate * group.get("lr_scale", 1.0)
            decay = config.weight_decay  # else the checkpoint's
            group["weight_decay"] = decay * group.get("weight_decay_scale", 1.0)
        loss, grad_norm = engine.step(batch)
        if on_step_end:
            with driver.during("on_step_end"):
                metrics.log_own(step, on_step_end(engine, step))
        metrics.add(batch, loss, grad_norm)
        stop = driver.should_stop()
        last = stop or step == total
        evaluates = is_due(step, config.eval_every, step == total)
        saves = saving.is_due(step, driver.now) or last
        if saves or evaluates or step % config.log_interval == 0:
            metrics.log(step, rate, loader)  # no step goes unlogged
        if evaluates:
            driver.enter("evaluate", step)
            metrics.log_eval(step, evaluate(engine, config))
        if saves:
            driver.enter("earlier save", step)
            checkpoint.await_earlier()
            driver.enter("save", step)
            state = {"step": step, "position": loader.position}
            state["history"] = metrics.history
            health.check_weights(engine, step)
            checkpoint.commit(engine, state, config, driver.notify)
            metrics.upload()
            metrics.reset()  # exclude the time to save from the speed
        if stop:
            break
    driver.enter("end", step)
    metrics.close()
    if config.export_to and step == total:
        driver.notify(card.export(engine, config, metrics.history))
        driver.flush()


class SaveSchedule:
    """When a checkpoint is due: by steps, by time, or by whichever comes first.

    Time counts from the end of the last save. By time, training lasts at least as long
    as that save did, so that saving never costs more than training.
    """

    def __init__(self, config: TrainConfig):
        self.every = config.checkpoint_every
        self.seconds = 60 * config.checkpoint_minutes
        self.since: float | None = None  # when training began, or went on after a save
        self.saved: float | None = None  # when the step of the last save began

    def is_due(self, step: int, now: float) -> bool:
        """To be asked once per step; ``now`` is when it began, in seconds."""
        if self.since is None:
            self.since = now
        took = 0.0 if self.saved is None else self.since - self.saved
        by_time = self.seconds > 0 and now - self.since >= max(self.seconds, took)
        due = by_time or is_due(step, self.every, last=False)
        if due:
            self.saved, self.since = now, None
        return due


def is_due(step: int, every: int, last: bool) -> bool:
    """Whether a task done once per ``every`` steps (0: never) is due at this step."""
    return every > 0 and (last or step % every == 0)
