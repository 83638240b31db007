"""The Ray cluster that a run uses: joined if one is running, else one of our own."""

from __future__ import annotations

import copyreg
import logging
import os
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from importlib import import_module
from pathlib import Path

import ray
import transformers
from ray.util.placement_group import (
    PlacementGroup,
    placement_group_table,
    remove_placement_group,
)

import tp2d_lib
from tp2d_lib.config import ConfigError, TrainConfig
from tp2d_lib.monitor import signals, watchdog

WORKER_ENV = {
    "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "300",  # slow machines import slowly
    "RAY_TRAIN_COLLECTIVE_TIMEOUT_S": "1800",  # to wait for a rank that never reports
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5",  # notice reports and the end promptly
    **watchdog.NCCL_ENV,
}
REPLACE_S = 600.0  # a cloud needs minutes to replace a node
own = False  # whether this process started the cluster


def connect(pip: str | None = None) -> None:
    """Join the running Ray cluster, or start one on this machine.

    ``tp2d_lib`` is sent to every worker. Set ``RAY_ADDRESS=local`` to start a cluster
    of your own beside a running one. It lives no longer than this process, so it gets
    no dashboard, which would open ports and take seconds to start. Ray asks whoever
    connects to it for the token in ``~/.ray/auth_token``.

    Args:
        pip: a requirements file that Ray installs for the workers on every node.
    """
    global own
    quiet()
    pickle_config_modules()
    if ray.is_initialized():
        return
    for name, value in WORKER_ENV.items():
        os.environ.setdefault(name, value)
    options = {
        "runtime_env": {
            # Not the module: Ray copies this when a job has an environment of its own.
            "py_modules": [str(Path(tp2d_lib.__file__).parent)],
            "env_vars": {name: os.environ[name] for name in WORKER_ENV},
            **({"pip": pip} if pip else {}),
        },
        "logging_level": logging.ERROR,
        "log_to_driver": False,
    }
    with signals.handlers_kept():
        if os.environ.get("RAY_ADDRESS") != "local":
            try:
                ray.init(address="auto", **options)
                return
            except ConnectionError:
                pass  # no cluster is running
        ray.init(address="local", include_dashboard=False, **options)
        own = True
        with suppress(OSError):  # Ray lets everybody on this machine read it
            Path.home().joinpath(".ray", "auth_token").chmod(0o600)


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


def free_workers() -> None:
    """In a cluster of our own, release what a dead controller of Ray Train still holds.

    Ray's own cleaner asks the dashboard, and fails where several clusters run on one
    machine. In a cluster that we joined, workers may be others': it must do there.
    """
    if not own:
        return
    for number, group in placement_group_table().items():
        if group["state"] != "REMOVED":
            remove_placement_group(
                PlacementGroup(ray.PlacementGroupID.from_hex(number))
            )


def wait_for_gpus(
    config: TrainConfig, show: Callable[..., None], seconds: float = REPLACE_S
) -> None:
    """Wait until a lost node's GPUs are replaced; Ray would, silently and for ever.

    Raises:
        ConfigError: they were not.
    """
    deadline, said = time.monotonic() + seconds, False
    while gpus() < config.num_workers and time.monotonic() < deadline:
        if not said:
            show(f"waiting for {config.num_workers} GPUs, the cluster has {gpus()}")
            said = True
        time.sleep(1)
    check_gpus(config)


def pick_device(config: TrainConfig) -> str:
    """ "cuda" or "cpu"; joins Ray to count its GPUs, unless ``device`` is "cpu".

    Raises:
        ConfigError: there are too few GPUs.
    """
    if config.device == "cpu":
        return "cpu"
    connect()
    if config.device == "auto" and gpus() == 0:
        return "cpu"
    check_gpus(config)
    for node in ray.nodes():
        here = int(node["Resources"].get("GPU", 0)) if node["Alive"] else 0
        if here % config.tp_size:
            print(
                f"Note: node {node['NodeManagerHostname']} has {here} GPUs, not a "
                f"multiple of tp_size={config.tp_size}: a TP group may span two nodes, "
                "where every layer waits for the network."
            )
    return "cuda"


def gpus() -> int:
    return int(ray.cluster_resources().get("GPU", 0))


def check_gpus(config: TrainConfig) -> None:
    if (found := gpus()) < config.num_workers:
        fits = f"tp_size and dp_size whose product is at most {found}, or "
        raise ConfigError(
            f"num_workers={config.num_workers} must not exceed the cluster's {found} "
            f"GPUs; try {fits * (found > 0)}device='cpu'"
        )
