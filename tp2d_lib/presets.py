"""The two ways a notebook can run: a tiny model offline, a real one on GPUs."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

from tp2d_lib.config import ConfigError, TrainConfig, closest, first_line
from tp2d_lib.data import demo
from tp2d_lib.validation import absolute

CLUSTER_STORAGE = "/mnt/cluster_storage"  # the shared folder of an Anyscale cluster

PRESETS = {
    "demo": {
        "seq_length": 128,
        "batch_size_per_gpu": 4,
        "learning_rate": 4e-3,
        "max_steps": 40,
    },
    "qwen2.5-0.5b": {
        "model_name": "Qwen/Qwen2.5-0.5B",
        "dataset_name": "Salesforce/wikitext",
        "dataset_config": "wikitext-2-raw-v1",
        "seq_length": 1024,
        "batch_size_per_gpu": 4,
        "learning_rate": 1e-5,
        "max_steps": 40,
    },
}


def choose(preset: str, gpus: int, num_workers: int) -> tuple[str, str]:
    """The preset to use and the reason; "auto" follows the hardware.

    Raises:
        ConfigError: there is no such preset.
    """
    names = ["auto", *PRESETS]
    if preset not in names:
        raise ConfigError(
            f"PRESET={preset!r} must be one of {', '.join(names)}; "
            f"try {closest(preset, names)!r}"
        )
    if preset != "auto":
        return preset, "set by PRESET"
    if gpus >= num_workers:
        return "qwen2.5-0.5b", f"the cluster has {gpus} GPUs, {num_workers} are needed"
    return "demo", f"{num_workers} GPUs are needed, the cluster has {gpus}"


def build_config(preset: str, storage_path: str | None, **settings) -> TrainConfig:
    """The TrainConfig of a preset; settings that are not None override its values."""
    values = preset_values(preset, storage_path or default_storage())
    values |= {name: value for name, value in settings.items() if value is not None}
    return TrainConfig(**values)


def preset_values(preset: str, storage_path: str) -> dict:
    """The fields that a preset sets; for the demo, writes its model and dataset.

    Raises:
        ConfigError: they cannot be written there.
    """
    values = {"storage_path": storage_path, **PRESETS[preset]}
    if preset == "demo":
        remote = "://" in storage_path
        try:
            home = default_storage() if remote else absolute(storage_path)
            model_name, dataset_name = demo.write(Path(home) / "demo")
        except (OSError, ValueError) as error:
            raise ConfigError(
                f"storage_path={storage_path!r} must be a writable folder "
                f"({first_line(error)}); try storage_path='/tmp/tp2d'"
            ) from error
        values |= {"model_name": model_name, "dataset_name": dataset_name}
    return values


def lesson_config(config: TrainConfig, **settings) -> TrainConfig:
    """The demo on a 2x2 mesh, for the live ranks of the lessons on any hardware."""
    demo_config = build_config("demo", config.storage_path, tp_size=2, dp_size=2)
    return replace(demo_config, batch_size_per_gpu=2, dtype="float32", **settings)


def default_storage() -> str:
    """A folder in the cluster's shared storage, if any, or in the current directory."""
    if os.path.isdir(CLUSTER_STORAGE):
        return os.path.join(CLUSTER_STORAGE, "tp2d")
    return os.path.abspath("tp2d_runs")
