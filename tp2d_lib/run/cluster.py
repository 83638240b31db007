"""The Ray cluster that a run uses: the one that is named, else one of our own."""

from __future__ import annotations

import copyreg
import logging
import os
import socket
import sys
import tempfile
from collections.abc import Callable
from functools import partial
from importlib import import_module
from pathlib import Path
from urllib.parse import urlsplit

import ray
import transformers
from ray._private.services import canonicalize_bootstrap_address
from ray.util.placement_group import (
    PlacementGroup,
    placement_group_table,
    remove_placement_group,
)
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

import tp2d_lib
from tp2d_lib.config import ConfigError, first_line
from tp2d_lib.run import signals, token
from tp2d_lib.run.environment import WORKER_ENV

# A cluster without a dashboard has no server to ask about actors, but Ray looks for one
# at its default port. Another cluster's dashboard there does not know our controller,
# and Ray's cleaner would take a run that lives for dead, and end its workers.
NO_SERVER = {"RAY_API_SERVER_ADDRESS": "http://127.0.0.1:9"}  # RFC 863's port: discard

own = False  # whether this process started the cluster


def connect(pip: str | None = None) -> None:
    """Join the Ray cluster that is named, or start one on this machine; say which.

    One is named by ``RAY_ADDRESS``, or by this user's ``ray start`` on this machine; a
    cluster that another process started for itself is not joined, nor with
    ``RAY_ADDRESS=local`` any other. Our own lives no longer than this process, so it
    gets no dashboard, which would open ports and take seconds to start. Ray asks
    whoever connects to it for the token in ``~/.ray/auth_token``; one that is joined
    gets its token, too, if it asks. ``tp2d_lib`` is sent to every worker.

    Args:
        pip: a requirements file that Ray installs for the workers on every node.

    Raises:
        ConfigError: the cluster does not answer, or its token is not here, or it is
            joined already, without ``tp2d_lib`` on some node; or ``pip`` is no file.
    """
    global own
    if pip is not None and not Path(pip).is_file():
        raise ConfigError(
            f"pip={pip!r} must be a requirements file on this machine; try "
            "requirements.txt, or leave it out where every node has the packages"
        )
    quiet()
    pickle_config_modules()
    for name, value in WORKER_ENV.items():
        os.environ.setdefault(name, value)
    if ray.is_initialized():
        return check_package()
    named = os.environ.get("RAY_ADDRESS") or started_here() or "local"
    with signals.handlers_kept():
        if named == "local":
            init_own(pip)
            token.hide()
        else:
            join(named, partial(init, pip))
    own = named == "local"
    address = ray.get_runtime_context().gcs_address
    print(
        f"started a local Ray cluster at {address}"
        if own
        else f"joined the Ray cluster at {address}: {len(nodes())} nodes, {gpus()} GPUs"
    )


def init_own(pip: str | None) -> None:
    try:
        init(pip, "local", **NO_SERVER)
    except OSError as error:
        if "AF_UNIX" not in str(error):
            raise
        raise ConfigError(
            f"RAY_TMPDIR={os.environ.get('RAY_TMPDIR', tempfile.gettempdir())!r} must "
            "be short, because Ray puts sockets there, whose names have at most 107 "
            "bytes; try RAY_TMPDIR=/tmp"
        ) from error


def init(pip: str | None, address: str, **variables: str) -> None:
    ray.init(
        address=address,
        include_dashboard=False,
        runtime_env={
            # Not the module: Ray copies this when a job has an environment of its own.
            "py_modules": [str(Path(tp2d_lib.__file__).parent)],
            "env_vars": {name: os.environ[name] for name in WORKER_ENV} | variables,
            **({"pip": pip} if pip else {}),
        },
        logging_level=logging.ERROR,
        log_to_driver=False,
    )


def join(address: str, init: Callable[[str], None]) -> None:
    if "://" in address:
        host = urlsplit(address).hostname or "HOST"
        raise ConfigError(
            f"RAY_ADDRESS={address!r} must be HOST:PORT as `ray start` prints it, and "
            f"not a URL, such as that of a dashboard; try RAY_ADDRESS={host}:6379"
        )
    try:
        if address == "auto":
            address = canonicalize_bootstrap_address(address)
        answers(address)
        token.authenticate(address)
        init(address)
    except ConfigError:
        raise
    except Exception as error:  # of many types, for whatever the address may be
        raise ConfigError(
            f"RAY_ADDRESS={address!r} must be the address of a running Ray cluster "
            f"({first_line(error)}); try RAY_ADDRESS=local for one of this process"
        ) from error


def started_here() -> str | None:
    """The cluster of this user's ``ray start`` on this machine, if it answers."""
    record = Path(os.environ.get("RAY_TMPDIR", "/tmp"), "ray", "ray_current_cluster")
    if not record.exists() or record.stat().st_uid != os.getuid():
        return None
    address = record.read_text().strip()
    try:
        answers(address)
    except (OSError, ValueError):
        return None  # it ended without `ray stop`
    return address


def answers(address: str) -> None:
    """Ray would wait for minutes for a cluster that is not there.

    Raises:
        OSError, ValueError: nothing listens at the address, or it is none.
    """
    host, _, port = address.rpartition(":")
    socket.create_connection((host, int(port)), timeout=10).close()


def check_package() -> None:
    """Every node can import ``tp2d_lib``, though others have called ``ray.init``.

    Ray uploads packages in ``ray.init`` only.

    Raises:
        ConfigError: one cannot.
    """
    here = ray.get_runtime_context().get_node_id()
    others = [node["NodeID"] for node in nodes() if node["NodeID"] != here]
    try:
        ray.get([on_node(node, has_package).remote() for node in others])
    except ray.exceptions.RayError as error:
        raise ConfigError(
            "ray.init() must send tp2d_lib to all nodes, some of which do not have it; "
            "try runtime_env={'py_modules': [tp2d_lib]}, or launch.connect() instead"
        ) from error


def on_node(node_id: str, function):
    here = NodeAffinitySchedulingStrategy(node_id, soft=False)
    return ray.remote(num_cpus=0)(function).options(scheduling_strategy=here)


def has_package() -> None:
    """Runs where it can be unpickled, which needs this module."""


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

    Ray's own cleaner asks a dashboard, which ours has not. In a cluster that we joined,
    workers may be others': it must do there.
    """
    if not own:
        return
    for number, group in placement_group_table().items():
        if group["state"] != "REMOVED":
            remove_placement_group(
                PlacementGroup(ray.PlacementGroupID.from_hex(number))
            )


def nodes() -> list[dict]:
    return [node for node in ray.nodes() if node["Alive"]]


def gpus() -> int:
    return int(ray.cluster_resources().get("GPU", 0))
