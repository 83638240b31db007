"""Which model a run began with: digests of its configuration and its weights."""

from __future__ import annotations

import hashlib
import json
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from huggingface_hub import constants, hf_hub_download, model_info
from transformers import PretrainedConfig

from tp2d_lib.config import TrainConfig
from tp2d_lib.integrity import digest
from tp2d_lib.model import files
from tp2d_lib.model.hub import errors_explained

KNOWN: dict[tuple, dict[str, str]] = {}
# No part of what the model is; transformers adds the last two where it reads the rest.
VARYING = ("_name_or_path", "transformers_version", "auto_map", "_commit_hash")


def of(config: TrainConfig) -> dict[str, str]:
    """SHA-256 of the content of ``config.json``, and of the weights at the start.

    Equal for a Hub model and a copy of its files, because the Hub records the same
    digests; and in every release of transformers, which may add defaults.
    """
    with errors_explained(config):
        content, _ = PretrainedConfig.get_config_dict(
            config.model_name, revision=config.model_revision
        )
    kept = {name: value for name, value in content.items() if name not in VARYING}
    parts = {"config.json": kept, "weights": file_digests(config)}
    texts = {k: json.dumps(v, sort_keys=True, default=str) for k, v in parts.items()}
    return {k: hashlib.sha256(text.encode()).hexdigest() for k, text in texts.items()}


def is_same(stored: dict[str, str], config: TrainConfig) -> bool:
    """Whether the model is that of a checkpoint, from what its manifest records.

    Earlier versions recorded the configuration as transformers completed it, under
    another name; of their checkpoints only the weights are compared.
    """
    return all(stored.get(k, found) == found for k, found in of(config).items())


def at_start(config: TrainConfig) -> dict[str, str]:
    """``of``, found once in a process: later checkpoints read no file, need no Hub."""
    model = config.model_name, config.model_revision
    if model not in KNOWN:
        KNOWN[model] = of(config)
    return KNOWN[model]


def file_digests(config: TrainConfig) -> dict[str, str]:
    """SHA-256 of each safetensors file that the model is read from, by name."""
    if os.path.isdir(config.model_name) or constants.HF_HUB_OFFLINE:
        paths = files.weight_files(files.local_directory(config), config)
        with ThreadPoolExecutor() as threads:  # hashing releases Python's lock
            digests = list(threads.map(digest, paths))
        return {path.name: found for path, found in zip(paths, digests, strict=True)}
    with errors_explained(config):
        return recorded_digests(config)


def recorded_digests(config: TrainConfig) -> dict[str, str]:
    """``file_digests`` as the Hub recorded them: no file of weights is read."""
    name = config.model_name
    info = model_info(name, revision=config.model_revision, files_metadata=True)
    stored = {file.rfilename: file.lfs for file in info.siblings or []}
    names = [files.SINGLE]
    if files.SINGLE not in stored:
        index = hf_hub_download(name, files.INDEX, revision=info.sha)
        names = files.names_in(Path(index), config)
    return {name: stored[name].sha256 for name in names if stored.get(name)}
