"""The token that a Ray cluster asks for of whoever joins it."""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path

import grpc
import ray
from ray._private.gcs_utils import create_gcs_channel
from ray._raylet import AuthenticationTokenLoader, Config
from ray.core.generated.gcs_service_pb2 import CheckAliveRequest
from ray.core.generated.gcs_service_pb2_grpc import NodeInfoGcsServiceStub

from tp2d_lib.config import ConfigError


def authenticate(address: str) -> None:
    """Send the cluster its token if it asks for one, from where Ray looks for it.

    Ray itself sends none to an address, and asks in vain for twenty seconds.

    Raises:
        ConfigError: there is no token, or it is another cluster's.
    """
    if lets_in(address):
        return
    mode = os.environ.setdefault("RAY_AUTH_MODE", "token")
    Config.initialize("")  # Ray read that variable when it was imported
    AuthenticationTokenLoader.instance().reset_cache()
    if lets_in(address):
        return
    names, file = ("RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"), "~/.ray/auth_token"
    places = [name for name in names if os.environ.get(name)]
    if Path(file).expanduser().exists():
        places.append(file)
    found = f"{places[0]} has another" if places else f"{names[0]} and {file} have none"
    advice = f"{names[0]} with what `ray get-auth-token` prints where it was started"
    if mode.lower() != "token":
        found, advice = f"RAY_AUTH_MODE={mode!r} sends none", "RAY_AUTH_MODE=token"
    raise ConfigError(
        f"RAY_ADDRESS={address!r} must be joined with the token of that cluster, but "
        f"{found}; try {advice}"
    )


def lets_in(address: str) -> bool:
    """Whether a cluster answers, with the token that Ray sends, if it sends one.

    Raises:
        OSError: what listens at the address is no Ray cluster.
    """
    with create_gcs_channel(address) as channel:
        try:
            NodeInfoGcsServiceStub(channel).CheckAlive(CheckAliveRequest(), timeout=10)
        except ray.exceptions.AuthenticationError:  # it has none to send
            return False
        except grpc.RpcError as error:
            if error.code() == grpc.StatusCode.UNAUTHENTICATED:
                return False
            raise OSError(error.details()) from error
    return True


def hide() -> None:
    """Ray lets everybody on this machine read it."""
    with suppress(OSError):
        Path.home().joinpath(".ray", "auth_token").chmod(0o600)
