"""A model's files: which ones count, and how each node gets those of a Hub model."""

from __future__ import annotations

import json
import os
import socket
from contextlib import suppress
from pathlib import Path

import torch.distributed as dist
from huggingface_hub import constants, snapshot_download, try_to_load_from_cache
from huggingface_hub.errors import LocalEntryNotFoundError

from tp2d_lib.config import ConfigError, TrainConfig, first_line
from tp2d_lib.mesh import is_first_on_node, made_by_nodes, patient_group
from tp2d_lib.model.hub import errors_explained, refused

SINGLE = constants.SAFETENSORS_SINGLE_FILE
INDEX = constants.SAFETENSORS_INDEX_FILE
ADAPTER = "adapter_config.json"  # PEFT's
SMALL = ["*.json", "*.txt", "*.model", "*.jinja"]  # configuration and tokenizer


def model_directory(config: TrainConfig) -> Path:
    """The folder with the model's files, on this node.

    In a process group, every rank must call it: of a Hub model, the first rank on each
    node downloads what the node lacks, while the others wait.

    Raises:
        ConfigError: on every rank, if one node cannot have the files.
    """
    if os.path.isabs(config.model_name) or not dist.is_initialized():
        return local_directory(config)  # a folder: every rank knows, and none waits
    folder = error = None
    group = patient_group()
    if is_first_on_node():
        try:
            folder = local_directory(config)
        except ConfigError as refusal:
            error = str(refusal)
    folders, error = made_by_nodes(folder, error, group)
    dist.destroy_process_group(group)
    if error:
        raise ConfigError(error)
    commits = sorted({folder.name for folder in folders.values()})
    if len(commits) > 1:  # it moved, or a node out of reach has an older one
        raise ConfigError(
            f"model_revision={config.model_revision!r} must be the same commit on "
            f"every node, not {' and '.join(commits)}; try {commits[0]!r}"
        )
    return folders[socket.gethostname()]


def local_directory(config: TrainConfig) -> Path:
    """``model_directory`` for a process that no other waits for.

    Raises:
        ConfigError: the files are not there, or cannot be downloaded.
    """
    if os.path.isdir(config.model_name):
        directory = Path(config.model_name)
        weight_files(directory, config)
        return directory
    with errors_explained(config):
        try:
            return download(config)
        except LocalEntryNotFoundError as error:  # the Hub is out of reach
            return cached_directory(config, error)


def present_directory(config: TrainConfig) -> Path:
    """``local_directory`` once the files are here: no Hub, which may move, is asked.

    Raises:
        ConfigError: they are not here.
    """
    if os.path.isdir(config.model_name):
        return Path(config.model_name)
    return cached_directory(config, LocalEntryNotFoundError("it is not in the cache"))


def download(config: TrainConfig) -> Path:
    """The folder of one commit in the Hub's cache, with what was missing in it.

    Processes may do so at once: each file is written under a name of its own, resumed
    if the connection breaks, and renamed once it is whole.

    Raises:
        LocalEntryNotFoundError: the Hub is out of reach, or must not be reached.
    """
    if constants.HF_HUB_OFFLINE:
        raise LocalEntryNotFoundError("HF_HUB_OFFLINE=1")
    folder = snapshot_download(
        config.model_name,
        revision=config.model_revision,
        allow_patterns=[*SMALL, SINGLE],
        ignore_patterns="*/*",
    )
    directory = Path(folder)
    if not (directory / SINGLE).is_file():
        snapshot_download(
            config.model_name,
            revision=directory.name,  # the commit of the index
            allow_patterns=names_in(directory / INDEX, config),
        )
    weight_files(directory, config)
    return directory


def cached_directory(config: TrainConfig, error: Exception) -> Path:
    """The folder of a model whose files are all in the cache, whoever put them there.

    ``snapshot_download`` would also ask for files that no model needs, such as a
    licence, and would take a folder without weights.

    Raises:
        ConfigError: they are not; ``error`` is why they cannot be downloaded.
    """
    found = try_to_load_from_cache(
        config.model_name, constants.CONFIG_NAME, revision=config.model_revision
    )
    if isinstance(found, str):
        with suppress(ConfigError):
            weight_files(Path(found).parent, config)
            return Path(found).parent
    raise refused(config, error) from error


def weight_files(directory: Path, config: TrainConfig) -> list[Path]:
    """The safetensors files that ``from_pretrained`` would read, and no others.

    Raises:
        ConfigError: there are none, or not all that the index names, or an adapter.
    """
    check_merged((directory / ADAPTER).is_file(), config)
    if (directory / SINGLE).is_file():
        return [directory / SINGLE]
    files = [directory / name for name in names_in(directory / INDEX, config)]
    for file in files:
        if not file.is_file():
            raise damaged(config, file.name, "it is in the index only")
    return files


def check_merged(has_adapter: bool, config: TrainConfig) -> None:
    """Where PEFT is installed, ``from_pretrained`` would add the adapter of the folder.

    Raises:
        ConfigError: there is one.
    """
    if has_adapter:
        raise ConfigError(
            f"model_name={config.model_name!r} must hold a whole model, but has "
            f"{ADAPTER}; merge the adapter with merge_and_unload and save_pretrained, "
            "or try without that file if it is merged"
        )


def names_in(index: Path, config: TrainConfig) -> list[str]:
    """The files that an index names."""
    if not index.is_file():
        raise no_safetensors(config)
    try:
        names = sorted(set(json.loads(index.read_bytes())["weight_map"].values()))
        if any(Path(name).name != name for name in names):
            raise ValueError("it names files outside its folder")
        return names
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise damaged(config, index.name, first_line(error)) from error


def no_safetensors(config: TrainConfig) -> ConfigError:
    return ConfigError(
        f"model_name={config.model_name!r} must hold safetensors files, {SINGLE} or "
        f"those that {INDEX} names; write them with save_pretrained"
    )


def damaged(config: TrainConfig, file: str, reason: str) -> ConfigError:
    return ConfigError(
        f"model_name={config.model_name!r} must hold an undamaged {file} "
        f"({reason}); try another copy of the model"
    )
