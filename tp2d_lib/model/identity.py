"""Which model a run began with: digests of its configuration and its weights."""

from __future__ import annotations

import hashlib
import json
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from huggingface_hub import constants, hf_hub_download, model_info

from tp2d_lib.config import TrainConfig
from tp2d_lib.integrity import digest
from tp2d_lib.model import files
from tp2d_lib.model.architecture import load_model_config
from tp2d_lib.model.hub import errors_explained

KNOWN: dict[tuple, dict[str, str]] = {}
VARYING = ("_name_or_path", "transformers_version")  # no part of what the model is


def of(config: TrainConfig) -> dict[str, str]:
    """SHA-256 of the model's configuration, and of its weights at the start.

    Equal for a Hub model and a copy of its files: the Hub records the same digests.
    """
    hf = load_model_config(config).to_dict()
    kept = {name: value for name, value in hf.items() if name not in VARYING}
    parts = {"config": kept, "weights": file_digests(config)}
    texts = {k: json.dumps(v, sort_keys=True, default=str) for k, v in parts.items()}
    return {k: hashlib.sha256(text.encode()).hexdigest() for k, text in texts.items()}


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
