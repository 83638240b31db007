"""What both ``check`` functions begin with: model, data, storage, hardware."""

from __future__ import annotations

from tp2d_lib import checkpoint, data, evaluate
from tp2d_lib.checkpoint import storage
from tp2d_lib.config import ConfigError, TrainConfig
from tp2d_lib.model import guards, weights
from tp2d_lib.monitor import reporting


def check(config: TrainConfig, marker: str) -> set[str]:
    """Find in the driver, before any worker starts, what does not fit together.

    Args:
        config: with the device that the run will use.
        marker: a file that every checkpoint of the engine holds, and no other does.

    Returns:
        The names of the tensors in the model's files.

    Raises:
        ConfigError: one sentence: the field, the value, the rule, a value that works.
    """
    guards.check_sizes(config)
    guards.check_compiler(config)
    stored = weights.stored_names(config)
    storage.check(config)
    check_written_by_engine(config, marker)
    data.check(config)
    evaluate.check(config)
    if config.report_to:
        reporting.check_installed()
    return stored


def check_written_by_engine(config: TrainConfig, marker: str) -> None:
    """The checkpoint that the run will load is one of its own engine."""
    start = checkpoint.start_of(config)
    if start and not storage.has(start, marker):
        named = start == config.resume_from_checkpoint
        field = "resume_from_checkpoint" if named else "run_name"
        raise ConfigError(
            f"{field}={getattr(config, field)!r} must resume with the engine that "
            f"wrote {start}, which has no {marker}; try the other command, or another "
            f"{field}"
        )
