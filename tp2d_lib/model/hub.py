"""Why the Hub does not hand out a model, in one sentence."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager

from huggingface_hub import constants
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HTTPError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from tp2d_lib.config import ConfigError, TrainConfig, first_line

UNUSABLE = {errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.ENOSPC}


@contextmanager
def errors_explained(config: TrainConfig) -> Iterator[None]:
    """Turn errors of the Hub's library into one sentence.

    All of them: those of the HTTP library below it share no class with the others.

    Raises:
        ConfigError: with the field, its value, and what to do.
    """
    try:
        yield
    except ConfigError:
        raise
    except Exception as error:
        raise refused(config, error) from error


def refused(config: TrainConfig, error: BaseException) -> ConfigError:
    """What to do about an error of a library that looked for a model."""
    if no_cache := cache_refused(error):
        return no_cache
    for cause in causes(error):
        if isinstance(cause, HfHubHTTPError):
            return ConfigError(denied(config, cause))
        if isinstance(cause, (HTTPError, LocalEntryNotFoundError)):
            return ConfigError(unreachable(config, cause))
    return ConfigError(
        f"model_name={config.model_name!r} must be a model directory or a model on the "
        f"Hub; try 'Qwen/Qwen2.5-0.5B' ({first_line(error)})"
    )


def cache_refused(error: BaseException) -> ConfigError | None:
    """What to do if the folder where the Hub's libraries keep files cannot be used."""
    datasets = os.environ.get("HF_DATASETS_CACHE", constants.HF_HOME)
    folders = constants.HF_HOME, constants.HF_HUB_CACHE, datasets
    for cause in causes(error):
        is_unusable = isinstance(cause, OSError) and cause.errno in UNUSABLE
        if is_unusable and str(cause.filename).startswith(folders):
            return ConfigError(
                f"HF_HOME={constants.HF_HOME!r} must be a writable folder for the "
                f"Hub's files ({first_line(cause)}); try HF_HOME=/tmp/hub"
            )
    return None


def causes(error: BaseException | None) -> Iterator[BaseException]:
    """An error, and those that it was raised from or while handling."""
    while error:
        yield error
        error = error.__cause__ or error.__context__


def denied(config: TrainConfig, error: HfHubHTTPError) -> str:
    """What the Hub's answer means; it says 401 and 404 of much that is not the same."""
    name, page = config.model_name, f"{constants.ENDPOINT}/{config.model_name}"
    status = error.response.status_code
    if isinstance(error, RevisionNotFoundError):
        return (
            f"model_revision={config.model_revision!r} must be a branch, a tag or a "
            f"commit of {name!r}; try 'main'"
        )
    must = f"model_name={name!r} must be"
    if isinstance(error, GatedRepoError) and status == 403:
        return (
            f"{must} open to your account, but is gated ({error.server_message}); ask "
            f"for access on {page}, or set HF_TOKEN to a token that has it"
        )
    if isinstance(error, GatedRepoError):
        return (
            f"{must} open to you, but is gated; accept its licence on {page} and set "
            "HF_TOKEN to a token of your account"
        )
    if isinstance(error, RepositoryNotFoundError):
        return (
            f"{must} a model directory or a model on the Hub, which shows you none of "
            "this name; try 'Qwen/Qwen2.5-0.5B', or set HF_TOKEN if it is private"
        )
    if status == 401:
        return (
            f"{must} requested with a valid token, which yours is not; set HF_TOKEN to "
            f"one from {constants.ENDPOINT}/settings/tokens"
        )
    return unreachable(config, error)


def unreachable(config: TrainConfig, error: BaseException) -> str:
    must = f"model_name={config.model_name!r} must be"
    if constants.HF_HUB_OFFLINE:
        return (
            f"{must} a model directory or a model on the Hub whose files are all in "
            "the cache, because HF_HUB_OFFLINE=1; try HF_HUB_OFFLINE=0"
        )
    return (
        f"{must} on the Hub at {constants.ENDPOINT}, which cannot be reached now "
        f"({first_line(error)}); try later, or HF_HUB_OFFLINE=1 if it is in the cache"
    )
