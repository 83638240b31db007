"""Resuming means the same run: what must be equal, and what may change."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import asdict, fields
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from tp2d_lib import store
from tp2d_lib.checkpoint import manifest
from tp2d_lib.checkpoint.manifest import CheckpointError
from tp2d_lib.config import ConfigError, TrainConfig
from tp2d_lib.data import checks
from tp2d_lib.model import identity

# Compared first: clearer messages.
EQUAL = ("optimizer", "decay", "seed", "seq_length", "pack")
EQUAL += ("lora_rank", "lora_alpha", "lora_target_modules")
COMPARED = ("model_name", "model_revision", "prepared_data")  # by content, see `about`
PLACES = (  # where things are, and who does them: no part of what is computed
    "run_name",
    "storage_path",
    "cache_dir",
    "prepared_eval_data",
    "resume_from_checkpoint",
    "num_workers",
    "export_to",
    "export_dtype",
    "merge_adapter",
)
LIBRARIES = ("torch", "transformers", "deepspeed")  # whose versions are recorded


def about(engine: str, config: TrainConfig) -> dict:
    """What a manifest records of the run that wrote the checkpoint."""
    return {
        "engine": engine,
        "settings": asdict(config),
        "model": identity.at_start(config),
        "rows": checks.digest(Path(config.prepared_data)),
        "versions": versions(),
    }


def versions() -> dict[str, str]:
    """Of the libraries that are installed: an engine does not need the other's."""
    found = {}
    for name in LIBRARIES:
        with suppress(PackageNotFoundError):
            found[name] = version(name)
    return found


def start_of(config: TrainConfig) -> str | None:
    """Path of the checkpoint that a run will load: its newest, or the one it names.

    Raises:
        CheckpointError: the run's folder holds checkpoints, but all are damaged.
    """
    last = manifest.last_of(config)
    if last is None and (found := manifest.checkpoints(config)):
        try:
            manifest.check(found[0])
        except CheckpointError as error:
            raise nothing_left(config, error) from error
    return last or config.resume_from_checkpoint


def candidates(config: TrainConfig) -> list[manifest.Folder]:
    """The checkpoints of which a run loads the first that is undamaged."""
    start = config.resume_from_checkpoint
    return manifest.checkpoints(config) or ([store.path(start)] if start else [])


def nothing_left(config: TrainConfig, error: object) -> CheckpointError:
    return CheckpointError(
        f"{manifest.run_folder(config)} must hold an undamaged checkpoint to resume "
        f"from, but {error}; restore it from a copy, or start with another run_name"
    )


def check(config: TrainConfig) -> dict | None:
    """Find in the driver that the checkpoint to load is of another run.

    Args:
        config: with the rows prepared.

    Returns:
        The manifest of the checkpoint, or None when the run begins at step 0.

    Raises:
        CheckpointError: it is damaged, and no other is left.
        ConfigError: it was written with another optimizer, model, seed or other rows.
    """
    start = start_of(config)
    if start is None:
        return None
    stored = manifest.check(start)
    for name in EQUAL:
        before = stored["settings"].get(name, getattr(TrainConfig, name))
        if before != getattr(config, name):
            raise differs(name, getattr(config, name), start, repr(before))
    if not identity.is_same(stored["model"], config):
        raise differs("model_name", config.model_name, start, "another model")
    if stored["rows"] != checks.digest(Path(config.prepared_data)):
        raise differs("prepared_data", config.prepared_data, start, "other rows")
    return stored


def changes(stored: dict, config: TrainConfig) -> str:
    """A line with the settings that changed since the checkpoint; empty if none did."""
    before = stored["settings"]
    changed = [
        f"{f.name} {before.get(f.name)} -> {getattr(config, f.name)}"
        for f in fields(config)
        if f.name not in (*EQUAL, *COMPARED, *PLACES)
        and before.get(f.name) != getattr(config, f.name)
    ]
    return f"changed since step {stored['step']}: {', '.join(changed)}" * bool(changed)


def check_engine(engine: str, config: TrainConfig) -> None:
    """The checkpoint that the run will load was written by this engine."""
    start = start_of(config)
    if start and (wrote := manifest.check(start)["engine"]) != engine:
        named = start == config.resume_from_checkpoint
        field = "resume_from_checkpoint" if named else "run_name"
        raise ConfigError(
            f"{field}={getattr(config, field)!r} must resume with the engine that "
            f"wrote {start}, {wrote!r}; try the other command, or another {field}"
        )


def differs(name: str, value: object, start: str, before: str) -> ConfigError:
    return ConfigError(
        f"{name}={value!r} must be what {start} was written with, {before}; set it "
        "back, or try another run_name"
    )
