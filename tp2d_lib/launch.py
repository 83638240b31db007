"""Start Ray, check and prepare the run, and train on every worker."""

from __future__ import annotations

import copyreg
import logging
import os
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from functools import partial
from importlib import import_module
from pathlib import Path

import ray
import ray.train
import transformers
import yaml
from ray.train.torch import TorchConfig, TorchTrainer

import tp2d_lib
from tp2d_lib import attempts, checkpoint, data, evaluate
from tp2d_lib.checkpoint import lease, manifest, resume, storage
from tp2d_lib.config import ConfigError, TrainConfig
from tp2d_lib.monitor import failures, progress, reporting, signals, watchdog

WORKER_ENV = {
    "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "300",  # slow machines import slowly
    "RAY_TRAIN_COLLECTIVE_TIMEOUT_S": "1800",  # to wait for a rank that never reports
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5",  # notice reports and the end promptly
    **watchdog.NCCL_ENV,
}


def connect() -> None:
    """Join the running Ray cluster, or start one on this machine.

    ``tp2d_lib`` is sent to every worker. Set ``RAY_ADDRESS=local`` to start a cluster
    of your own beside a running one. A cluster started here lives no longer than the
    run, so it gets no dashboard, which would open ports and take seconds to start.
    """
    quiet()
    pickle_config_modules()
    if ray.is_initialized():
        return
    for name, value in WORKER_ENV.items():
        os.environ.setdefault(name, value)
    options = {
        "runtime_env": {
            "py_modules": [tp2d_lib],
            "env_vars": {name: os.environ[name] for name in WORKER_ENV},
        },
        "logging_level": logging.ERROR,
        "log_to_driver": False,
    }
    if os.environ.get("RAY_ADDRESS") != "local":
        try:
            ray.init(address="auto", **options)
            return
        except ConnectionError:
            pass  # no cluster is running
    ray.init(address="local", include_dashboard=False, **options)


def quiet() -> None:
    """Turn off the libraries' progress bars, which would fill the page."""
    import datasets  # here: slow, workers do not need it

    datasets.disable_progress_bars()
    transformers.logging.disable_progress_bar()


def pickle_config_modules() -> None:
    """Let notebook functions that use both ``dist`` and ``.config`` be sent by value.

    cloudpickle mistakes the pair for ``torch.distributed.config``, one of PyTorch's
    configuration modules, which cannot be pickled; pickle them as imports instead.
    """
    for module in list(sys.modules.values()):
        if type(module).__name__ == "ConfigModuleInstance":
            copyreg.pickle(type(module), lambda m: (import_module, (m.__name__,)))


def as_yaml(config: TrainConfig) -> str:
    """The configuration as YAML, which the commands read back with ``--config``."""
    return yaml.safe_dump(asdict(config), sort_keys=False)


class Stopped(RuntimeError):
    """A signal ended the run early; everything up to its last step is saved."""


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
        Stopped: a signal ended the run early.
        CheckpointError: the run has checkpoints, but all are damaged.
        ray.train.TrainingFailedError: a worker failed more than ``max_failures`` times,
            or in a way that it would again.
        Hang, LeaseLost: see ``attempts.fit``.
    """
    config = replace(config, device=pick_device(config))
    return train(train_func, prepare(check(config)))


def train(train_func: Callable[[TrainConfig], None], config: TrainConfig):
    """``run`` for a configuration that is already checked and prepared."""
    if result := finished(config):
        return result
    with lease.hold(config) as held:
        return train_alone(train_func, config, held)


def train_alone(train_func, config: TrainConfig, held: lease.Lease):
    """``train`` as the only process that writes into the run's folder."""
    connect()
    storage.append(config, "config.yaml", as_yaml(config))
    callbacks = [reporting.MLflowCallback(config)] if config.report_to else []
    status = "FAILED"
    try:
        with (
            progress.Watcher(config) as watcher,
            signals.on_first_signal(watcher.stop_training) as caught,
        ):
            held.on_loss(watcher.end_attempt)
            trainer = partial(build_trainer, train_func, config, callbacks, held.holder)
            result = attempts.fit(trainer, config, watcher, caught)
        early = caught and result.metrics["step"] < watcher.total
        status = "KILLED" if early else "FINISHED"
    finally:
        for callback in callbacks:
            callback.finish(status)
    if early:
        raise Stopped(f"{caught[0]} after step {result.metrics['step']}")
    return result


def build_trainer(train_func, config: TrainConfig, callbacks, holder) -> TorchTrainer:
    use_gpu = config.device == "cuda"
    cpus = ray.cluster_resources().get("CPU", 1)
    return TorchTrainer(
        lambda: failures.on_rank(train_func, config, holder),
        torch_config=TorchConfig(backend="nccl" if use_gpu else "gloo"),
        scaling_config=ray.train.ScalingConfig(
            num_workers=config.num_workers,
            use_gpu=use_gpu,
            resources_per_worker={
                "CPU": min(1, cpus / config.num_workers),
                **({"GPU": 1} if use_gpu else {}),
            },
        ),
        run_config=ray.train.RunConfig(
            name=config.run_name,
            storage_path=config.storage_path,
            callbacks=callbacks,
            failure_config=ray.train.FailureConfig(max_failures=0),  # see attempts
        ),
    )


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
    print(
        f"nothing left to train after step {loader.step} of {start}; to go on, raise "
        "max_steps or num_epochs"
    )
    path = str(manifest.run_folder(config))
    return ray.train.Result(
        {"step": loader.step}, ray.train.Checkpoint(start), error=None, path=path
    )


def prepare(config: TrainConfig) -> TrainConfig:
    """Fill in what is decided once per run: its rows and its name.

    Raises:
        ConfigError: the data yields too few rows, or other rows than those of the
            checkpoint that the run starts from.
    """
    rows, held_out = data.prepare(config), evaluate.prepare(config)
    data.BatchLoader(config, rows, dp_rank=0)  # raises if they fill no global batch
    config = replace(
        config,
        run_name=config.run_name or time.strftime("run-%Y%m%d-%H%M%S"),
        prepared_data=str(rows),
        prepared_eval_data=held_out and str(held_out),
    )
    stored = resume.check(config)
    if stored and (changed := resume.changes(stored, config)):
        print(changed)
    return config


def pick_device(config: TrainConfig) -> str:
    """ "cuda" or "cpu"; joins Ray to count its GPUs, unless ``device`` is "cpu".

    Raises:
        ConfigError: there are too few GPUs.
    """
    if config.device == "cpu":
        return "cpu"
    connect()
    gpus = int(ray.cluster_resources().get("GPU", 0))
    if config.device == "auto" and gpus == 0:
        return "cpu"
    if gpus < config.num_workers:
        fits = f"tp_size and dp_size whose product is at most {gpus}, or " * (gpus > 0)
        raise ConfigError(
            f"num_workers={config.num_workers} must not exceed the cluster's {gpus} "
            f"GPUs; try {fits}device='cpu'"
        )
    for node in ray.nodes():
        here = int(node["Resources"].get("GPU", 0)) if node["Alive"] else 0
        if here % config.tp_size:
            print(
                f"Note: node {node['NodeManagerHostname']} has {here} GPUs, not a "
                f"multiple of tp_size={config.tp_size}: a TP group may span two nodes, "
                "where every layer waits for the network."
            )
    return "cuda"
