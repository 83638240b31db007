"""Which values a TrainConfig may have: types, ranges, choices, combinations, paths."""

from __future__ import annotations

import difflib
import glob
import math
import os
import re
from dataclasses import fields
from functools import cache
from typing import Any, get_type_hints


class UserError(Exception):
    """Shown in a notebook as one sentence, as on the command line: no traceback."""

    def _render_traceback_(self) -> list[str]:  # IPython asks for it
        return [f"{type(self).__name__}: {self}"]


class ConfigError(UserError, ValueError):
    """A value the user can correct: names the field, the value and the rule."""


SYNONYMS = {"gpu": "cuda"}  # what people type, not as similar as another choice
POSITIVE = {  # field -> a value that works
    "seq_length": 512,
    "preprocessing_num_workers": 1,
    "tp_size": 1,
    "dp_size": 1,
    "dp_replicate_size": 1,
    "num_workers": 1,
    "min_dp_size": 1,
    "batch_size_per_gpu": 1,
    "gradient_accumulation_steps": 1,
    "num_epochs": 1,
    "max_steps": 100,
    "learning_rate": 1e-5,
    "adam_epsilon": 1e-8,
    "max_grad_norm": 1.0,
    "save_total_limit": 2,
    "hang_timeout": 600,
    "log_interval": 10,
}
NOT_NEGATIVE = (
    "weight_decay",
    "warmup_steps",
    "eval_every",
    "checkpoint_every",
    "checkpoint_minutes",
    "max_failures",
    "loss_chunk_tokens",
    "seed",
)
BELOW_1 = {  # field -> a value that works
    "eval_fraction": 0.01,
    "adam_beta1": 0.9,
    "adam_beta2": 0.999,
}
FROM_0_TO_1 = {"warmup_ratio": 0.03, "min_lr_ratio": 0.1}
READ_BY = {  # field -> the setting that reads it, and its values that do
    "adam_beta1": ("optimizer", ["adamw"]),
    "adam_beta2": ("optimizer", ["adamw"]),
    "adam_epsilon": ("optimizer", ["adamw"]),
    "min_lr_ratio": ("lr_scheduler_type", ["cosine", "linear"]),
}
PATHS = (
    "prepared_data",
    "prepared_eval_data",
    "storage_path",
    "cache_dir",
    "resume_from_checkpoint",
    "export_to",
)
TEXTS = ("partition_config",)  # may have several lines
NAMES = ("model_name", "dataset_name", "eval_dataset")  # a path, or a name on the Hub


type_hints = cache(get_type_hints)  # resolving them takes longer than all the rest


def check_types(config: Any) -> None:
    """Each value has its field's type; an int is accepted where a float is expected."""
    hints = type_hints(type(config))
    for f in fields(config):
        value, hint = getattr(config, f.name), hints[f.name]
        if type(value) is int and value.bit_length() > 63:  # too long even to print
            raise ConfigError(
                f"{f.name}, an integer of {value.bit_length()} bits, must have at most "
                f"63; its default is {f.default!r}"
            )
        allowed = getattr(hint, "__args__", (hint,))  # `int | None` -> (int, NoneType)
        if float in allowed and type(value) is int:
            value = float(value)
            object.__setattr__(config, f.name, value)
        if type(value) not in allowed:
            names = " or ".join(
                "None" if t is type(None) else t.__name__ for t in allowed
            )
            raise ConfigError(
                f"{f.name}={value!r} must be {names}; its default is {f.default!r}"
            )
        if isinstance(value, str) and not value.strip():
            raise ConfigError(
                f"{f.name}={value!r} must not be empty; its default is {f.default!r}"
            )
        if isinstance(value, str) and f.name not in TEXTS and not value.isprintable():
            raise ConfigError(
                f"{f.name}={value!r} must be printable text in one line; its default "
                f"is {f.default!r}"
            )


def check_run_name(field: str, value: str) -> None:
    """A run's name is a folder's, an actor's and part of a URL: plain characters."""
    if not re.fullmatch("[A-Za-z0-9][A-Za-z0-9._-]{0,99}", value):
        raise ConfigError(
            f"{field}={value!r} must begin with a letter or digit, hold only letters "
            "A to Z, digits and ._-, and have at most 100 characters; try 'run-1'"
        )


def check_values(config: Any) -> None:
    for name in POSITIVE:
        value = getattr(config, name)
        if value is not None and not value > 0:
            raise ConfigError(f"{name}={value} must be positive; try {POSITIVE[name]}")
    for name in NOT_NEGATIVE:
        value = getattr(config, name)
        if value is not None and not value >= 0:
            raise ConfigError(f"{name}={value} must not be negative; try 0")
    if config.seq_length < 2:
        raise ConfigError(
            "seq_length=1 must be at least 2, because each token predicts the next; "
            "try 512"
        )
    if config.zero_stage not in range(4):
        raise ConfigError(f"zero_stage={config.zero_stage} must be 0, 1, 2 or 3; try 1")
    if not 0 < config.dataset_percentage <= 100:
        raise ConfigError(
            f"dataset_percentage={config.dataset_percentage:g} must be above 0 and at "
            "most 100; try 100"
        )
    for name, works in BELOW_1.items():
        if not 0 <= (value := getattr(config, name)) < 1:
            raise ConfigError(
                f"{name}={value:g} must be at least 0 and below 1; try {works}"
            )
    for name, works in FROM_0_TO_1.items():
        if not 0 <= (value := getattr(config, name)) <= 1:
            raise ConfigError(f"{name}={value:g} must be from 0 to 1; try {works}")
    for f in fields(config):
        choices, value = f.metadata["choices"], getattr(config, f.name)
        if isinstance(value, float) and not math.isfinite(value):
            raise ConfigError(f"{f.name}={value} must be finite; try {f.default}")
        if choices and value is not None and value not in choices:
            raise ConfigError(
                f"{f.name}={value!r} must be one of {', '.join(choices)}; "
                f"try {closest(value, choices)}"
            )
    if config.run_name is not None:
        check_run_name("run_name", config.run_name)


def check_combinations(config: Any) -> None:
    for name, (reader, values) in READ_BY.items():
        value, chosen = getattr(config, name), getattr(config, reader)
        if value != getattr(type(config), name) and chosen not in values:
            raise ConfigError(
                f"{name}={value:g} must be combined with {reader} "
                f"{' or '.join(values)}, because {chosen} does not read it; try "
                f"{reader}={values[0]!r}"
            )
    world_size = config.tp_size * config.dp_size
    if config.num_workers != world_size:
        raise ConfigError(
            f"num_workers={config.num_workers} must equal tp_size * dp_size = "
            f"{config.tp_size} * {config.dp_size}; try {world_size}"
        )
    if config.dp_size % config.dp_replicate_size:
        raise ConfigError(
            f"dp_replicate_size={config.dp_replicate_size} must divide "
            f"dp_size={config.dp_size}; "
            f"try {math.gcd(config.dp_size, config.dp_replicate_size)}"
        )
    fewest = config.min_dp_size or config.dp_size
    if fewest > config.dp_size:
        raise ConfigError(
            f"min_dp_size={fewest} must be at most dp_size={config.dp_size}; try 1"
        )
    if fewest < config.dp_size and config.dp_replicate_size > 1:
        raise ConfigError(
            f"min_dp_size={fewest} cannot be combined with "
            f"dp_replicate_size={config.dp_replicate_size}, whose copies a lost node "
            "would tear apart; try min_dp_size=None"
        )
    if config.loss_chunk_tokens and config.dtype == "float16":
        raise ConfigError(
            f"loss_chunk_tokens={config.loss_chunk_tokens} cannot be combined with "
            "dtype='float16', whose loss is scaled too late for gradients computed in "
            "the forward pass; try loss_chunk_tokens=0"
        )
    if config.eval_fraction and config.eval_dataset:
        raise ConfigError(
            f"eval_fraction={config.eval_fraction:g} cannot be combined with "
            f"eval_dataset={config.eval_dataset!r}, which is held out already; try "
            "eval_fraction=0"
        )
    if "://" in config.storage_path and config.cache_dir is None:
        raise ConfigError(
            f"cache_dir=None must name a folder every node sees when "
            f"storage_path={config.storage_path!r} is remote, because tokenised rows "
            "are memory-mapped; try cache_dir='/mnt/cluster_storage/data'"
        )
    for name in ("cache_dir", "prepared_data", "prepared_eval_data"):
        if "://" in (getattr(config, name) or ""):
            raise ConfigError(
                f"{name}={getattr(config, name)!r} must be a folder on a disk that "
                "every node sees, because rows of tokens are memory-mapped; try "
                f"{name}='/mnt/cluster_storage/data'"
            )


def make_paths_absolute(config: Any) -> None:
    """Make local paths absolute: Ray starts each worker in a directory of its own.

    A name that could also be on the Hub counts as a path if it is written as one or if
    such a folder exists, as in ``from_pretrained``. No file is opened.
    """
    for name in (*PATHS, *NAMES):
        value = getattr(config, name)
        if value is None or "://" in value:
            continue
        if name in PATHS:
            object.__setattr__(config, name, absolute(value))
            continue
        parts = [absolute(part) if is_path(part) else part for part in several(value)]
        object.__setattr__(config, name, ",".join(parts))
    rules = config.partition_config
    if isinstance(rules, str) and not rules.lstrip().startswith("{"):  # not JSON text
        object.__setattr__(config, "partition_config", absolute(rules))


def several(value: str) -> list[str]:
    """The names in a list with commas; a path or a pattern may have some of its own."""
    is_one = os.path.exists(value) or glob.glob(os.path.expanduser(value))
    return [value] if is_one else [part.strip() for part in value.split(",")]


def is_path(name: str) -> bool:
    written_as_path = name.startswith((".", "~", "/")) or any(c in name for c in "*?[")
    return written_as_path or os.path.exists(name)


def absolute(path: str) -> str:
    return os.path.abspath(os.path.expanduser(path))


def first_line(error: BaseException) -> str:
    """What an error says, in one line, to be put into a sentence."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


def closest(value: str, choices) -> str:
    """The choice most similar to a mistyped value; the first if none is similar."""
    lowered = {choice.lower(): choice for choice in reversed(list(choices))}
    given = str(value).lower()
    matches = difflib.get_close_matches(SYNONYMS.get(given, given), lowered, n=1)
    return lowered[matches[0]] if matches else next(iter(choices))
