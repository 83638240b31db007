"""Start Ray, check and prepare the run, and train on every worker."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict, fields, replace
from functools import partial
from importlib import import_module
from pathlib import Path

import ray.train
import yaml
from ray.train.torch import TorchConfig, TorchTrainer

from tp2d_lib import checkpoint, data, store
from tp2d_lib.checkpoint import lease, manifest, resume, storage
from tp2d_lib.config import ConfigError, TrainConfig, first_line
from tp2d_lib.model import determinism
from tp2d_lib.run import (
    attempts,
    cluster,
    environment,
    evaluate,
    failures,
    placement,
    signals,
)
from tp2d_lib.run.attempts import Failed, Stopped
from tp2d_lib.run.cluster import connect, quiet
from tp2d_lib.run.placement import gpus, pick_device, pick_dtype
from tp2d_lib.run.watcher import Watcher

__all__ = [
    "as_yaml",
    "connect",
    "gpus",
    "pick_device",
    "pick_dtype",
    "prepare",
    "quiet",
    "run",
    "train",
]
NOTHING_SAVED = "no checkpoint was written yet"


def as_yaml(config: TrainConfig) -> str:
    """The configuration as YAML, which the commands read back with ``--config``."""
    return yaml.safe_dump(asdict(config), sort_keys=False)


def run(
    train_func: Callable[[TrainConfig], None],
    config: TrainConfig,
    check: Callable[[TrainConfig], TrainConfig],
):
    """Run ``train_func(config)`` on ``config.num_workers`` Ray workers.

    First the device is chosen, then the configuration is checked and the data prepared,
    all in the driver. A run that loses a worker restarts from its latest checkpoint, up
    to ``max_failures`` times; a run started again with the same ``run_name`` and
    ``storage_path`` resumes where it stopped, even on another mesh. Ctrl-C or SIGTERM
    ends it after the current step, with a checkpoint; a second one ends it immediately.

    Args:
        check: that of the engine which ``train_func`` builds, ``fsdp.check`` or
            ``autotp.check``.

    Returns:
        Ray Train's Result: ``checkpoint``, ``path``, ``metrics``.

    Raises:
        ConfigError, PlanError: before any worker starts; a run of this name may live.
        CheckpointError: the run has checkpoints, but all are damaged.
        Stopped: a signal ended the run early; the message names the last checkpoint.
        Failed: a worker failed more than ``max_failures`` times, or as it would again.
    """
    config = replace(config, device=pick_device(config))
    config = replace(config, dtype=pick_dtype(config))
    config = prepare(check(config))
    try:
        return train(train_func, config)
    except (Failed, Stopped) as error:
        again = f"to resume: run again with run_name={config.run_name!r}"
        raise type(error)("\n".join([str(error), saved(config), again])) from error


def train(train_func: Callable[[TrainConfig], None], config: TrainConfig):
    """``run`` for a configuration that is already checked and prepared.

    Its errors do not say where the last checkpoint is, or how to resume.
    """
    if result := finished(config):
        return result
    try:
        with lease.hold(config) as held:
            return train_alone(train_func, config, held)
    except OSError as error:  # Arrow's, after all its retries
        if not store.is_remote(config.storage_path):
            raise
        raise Failed(
            f"storage_path={config.storage_path!r} must stay readable and writable "
            f"during a run ({first_line(error)}); try again once it is"
        ) from error


def train_alone(train_func, config: TrainConfig, held: lease.Lease):
    """``train`` as the only process that writes into the run's folder."""
    connect()
    placement.check_nodes(config)
    storage.append(config, "config.yaml", as_yaml(config))
    try:
        with (
            Watcher(config) as watcher,
            signals.on_first_signal(watcher.stop_training) as caught,
        ):
            held.on_loss(watcher.end_attempt)
            trainer = partial(build_trainer, train_func, config, held.holder, watcher)
            result = attempts.fit(trainer, config, watcher, caught)
        if result.checkpoint is None:  # the workers found nothing left to train
            result = result_of(config, watcher.total, watcher.start)
        early = caught and result.metrics["step"] < watcher.total
    except KeyboardInterrupt as error:
        cluster.free_workers()  # else those of a notebook would go on
        raise Stopped(
            str(error) or "at once, by a second signal; nothing was saved"
        ) from error
    if early:
        raise Stopped(f"{caught[0]} after step {result.metrics['step']}")
    return result


def prepare_start(config: TrainConfig, show: Callable[[str], None]) -> None:
    """What the engine of the checkpoint to load does before it is loaded, if anything.

    The checkpoint names its engine, a folder beside this file.
    """
    if start := checkpoint.start_of(config):
        engine = import_module(f"tp2d_lib.{manifest.read(start)['engine']}")
        getattr(engine, "prepare_start", lambda *_: None)(config, show)


def saved(config: TrainConfig) -> str:
    """A line with the run's last checkpoint."""
    try:
        last = checkpoint.last_of(config)
    except OSError:  # of a store that is away
        last = "unknown while storage_path cannot be read"
    return f"last checkpoint: {last}" if last else NOTHING_SAVED


def build_trainer(
    train_func, wanted: TrainConfig, holder, watcher: Watcher
) -> tuple[TorchTrainer, Callable[[], bool] | None]:
    """The trainer of an attempt, and, if it is narrower than wanted, what to ask
    whether there is room for the whole again.
    """
    cluster.free_workers()
    try:
        config, nodes = placement.place(wanted, watcher.show)
    except ConfigError as error:
        raise Failed(str(error)) from error
    prepare_start(config, partial(watcher.show, done=True))
    watcher.config, has_room = config, None
    if config.dp_size < wanted.dp_size:
        watcher.show(
            f"dp_size {wanted.dp_size} -> {config.dp_size} until there is room",
            done=True,
        )
        has_room = partial(placement.has_room, wanted, config)
    use_gpu = config.device == "cuda"
    variables, secrets = environment.to_send()
    if config.deterministic:
        variables |= determinism.environment()
    path, files = store.for_ray(config.storage_path)
    trainer = TorchTrainer(
        lambda: failures.on_rank(train_func, config, holder, secrets),
        torch_config=TorchConfig(backend="nccl" if use_gpu else "gloo"),
        scaling_config=ray.train.ScalingConfig(
            num_workers=config.num_workers,
            use_gpu=use_gpu,
            resources_per_worker=placement.resources(config),
            label_selector=nodes,
        ),
        run_config=ray.train.RunConfig(
            name=config.run_name,
            storage_path=path,
            storage_filesystem=files,
            worker_runtime_env={"env_vars": variables},
            failure_config=never_retry(),
        ),
    )
    return trainer, has_room


def never_retry() -> ray.train.FailureConfig:
    """Ray restarts nothing, since ``attempts`` does; Ray 2.57 lacks the last field."""
    limits = {"max_failures", "controller_failure_limit", "max_preemption_failures"}
    known = {field.name for field in fields(ray.train.FailureConfig)}
    return ray.train.FailureConfig(**dict.fromkeys(limits & known, 0))


def finished(config: TrainConfig) -> ray.train.Result | None:
    """The result of a run that has nothing left to train or export, or None."""
    start = checkpoint.start_of(config)
    if start is None or config.export_to:
        return None
    loader = data.BatchLoader(config, Path(config.prepared_data), dp_rank=0)
    stored = manifest.read(start)
    loader.step, loader.position = stored["step"], stored["position"]
    if loader.steps_left:
        return None
    try:
        manifest.verify(start)
    except checkpoint.CheckpointError:
        return None  # the workers go back to the one before
    print(
        f"nothing left to train after step {loader.step} of {start}; to train longer, "
        "raise max_steps or num_epochs"
    )
    return result_of(config, loader.step, start)


def result_of(config: TrainConfig, step: int, start: str) -> ray.train.Result:
    """The result of a run that trained no step after a checkpoint."""
    path = str(manifest.run_folder(config))
    return ray.train.Result(
        {"step": step}, checkpoint.as_checkpoint(start), error=None, path=path
    )


def prepare(config: TrainConfig) -> TrainConfig:
    """Fill in what is decided once per run: its rows and its name.

    Raises:
        ConfigError: the data yields too few rows, or other rows than those of the
            checkpoint that the run starts from.
    """
    rows, held_out = data.prepare(config), evaluate.prepare(config)
    data.BatchLoader(config, rows, dp_rank=0)  # raises if they fill no global batch
    print(data.describe(rows), flush=True)
    if held_out:
        print(f"held out: {data.describe(held_out)}", flush=True)
    config = replace(
        config,
        run_name=config.run_name or time.strftime("run-%Y%m%d-%H%M%S"),
        pack=data.pack_of(rows, config),
        prepared_data=str(rows),
        prepared_eval_data=held_out and str(held_out),
    )
    stored = resume.check(config)
    if stored and (changed := resume.changes(stored, config)):
        print(changed)
    return config
