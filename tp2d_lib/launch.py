"""Start Ray, prepare the data, run a training function on every worker."""

from __future__ import annotations

import copyreg
import logging
import os
import socket
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from importlib import import_module

import ray
import ray.train
import yaml
from pyarrow.fs import FileSystem
from ray.train.torch import TorchConfig, TorchTrainer

import tp2d_lib
from tp2d_lib import data, progress
from tp2d_lib.config import ConfigError, TrainConfig

WORKER_ENV = {
    "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "300",  # slow machines import slowly
    "RAY_TRAIN_COLLECTIVE_TIMEOUT_S": "1800",  # a rank that never reports
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5",  # reports and the end are seen at once
}


def connect() -> None:
    """Join the running Ray cluster, or start one on this machine.

    ``tp2d_lib`` travels to every worker. Set ``RAY_ADDRESS=local`` to start a cluster
    of your own beside a running one.
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
    ray.init(address="local", **options)


def quiet() -> None:
    """Turn off progress bars of libraries that would fill the page."""
    import datasets
    import transformers

    datasets.disable_progress_bars()
    transformers.logging.disable_progress_bar()


def pickle_config_modules() -> None:
    """Let notebook functions that say both ``dist`` and ``.config`` travel by value.

    cloudpickle takes the pair for ``torch.distributed.config``, one of PyTorch's
    configuration modules, which do not pickle; pickle them as what they are, imports.
    """
    for module in list(sys.modules.values()):
        if type(module).__name__ == "ConfigModuleInstance":
            copyreg.pickle(type(module), lambda m: (import_module, (m.__name__,)))


class RankFailed(RuntimeError):
    """What a rank raised, in one line: when, on which host, what."""


def on_rank(train_func: Callable[[TrainConfig], None], config: TrainConfig) -> None:
    """Run on one worker; the driver must tell the first failure from its echoes."""
    try:
        train_func(config)
    except Exception as error:
        sentence = (str(error).strip().splitlines() or [""])[0]
        host = socket.gethostname()
        raise RankFailed(
            f"{time.time():.3f} {host} {type(error).__name__}: {sentence}"
        ) from error


def store_config(config: TrainConfig) -> str:
    """Write the resolved configuration into the run's folder; returns the YAML text."""
    text = yaml.safe_dump(asdict(config), sort_keys=False)
    files, storage = FileSystem.from_uri(storage_uri(config.storage_path))
    files.create_dir(f"{storage}/{config.run_name}")
    with files.open_output_stream(f"{storage}/{config.run_name}/config.yaml") as file:
        file.write(text.encode())
    return text


def run(train_func: Callable[[TrainConfig], None], config: TrainConfig):
    """Train: ``train_func(config)`` on ``config.num_workers`` Ray workers.

    The data is prepared first, here. A run that loses a worker restarts from its last
    checkpoint, ``max_failures`` times; a run started again under the same ``run_name``
    and ``storage_path`` goes on where it stopped, also on another mesh.

    Returns:
        Ray Train's Result: ``checkpoint``, ``path``, ``metrics``.

    Raises:
        ConfigError: before any worker starts.
        ray.train.TrainingFailedError: a worker failed more than ``max_failures`` times.
    """
    connect()
    config = resolve(config)
    use_gpu = config.device == "cuda"
    cpus = ray.cluster_resources().get("CPU", 1)
    trainer = TorchTrainer(
        lambda: on_rank(train_func, config),
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
            storage_path=storage_uri(config.storage_path),
            failure_config=ray.train.FailureConfig(max_failures=config.max_failures),
            checkpoint_config=ray.train.CheckpointConfig(
                num_to_keep=config.save_total_limit
            ),
        ),
    )
    with progress.Watcher(config.run_name):
        return trainer.fit()


def resolve(config: TrainConfig) -> TrainConfig:
    """Fill in what is decided once per run: its device, its name and its rows."""
    return replace(
        config,
        device=pick_device(config),
        run_name=config.run_name or time.strftime("run-%Y%m%d-%H%M%S"),
        prepared_data=str(data.prepare(config)),
    )


def storage_uri(path: str) -> str:
    return path if "://" in path else os.path.abspath(path)


def pick_device(config: TrainConfig) -> str:
    """ "cuda" or "cpu"; too few GPUs are an error, unless the CPU was asked for."""
    gpus = int(ray.cluster_resources().get("GPU", 0))
    if config.device == "cpu" or (config.device == "auto" and gpus == 0):
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
