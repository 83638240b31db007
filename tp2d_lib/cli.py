"""The command line of both engines: flags from TrainConfig, errors in one sentence.

Slow modules are imported inside functions, so that ``--help`` does not wait for them.
"""

from __future__ import annotations

import argparse
import importlib
import os
import shlex
import signal
import sys
from dataclasses import fields, replace
from pathlib import Path
from typing import Any, get_type_hints

import yaml

from tp2d_lib.config import ConfigError, TrainConfig, closest, first_line
from tp2d_lib.validation import check_run_name

FLAGS = {"batch_size_per_gpu": "batch_size"}  # the only flag not named after its field
GROUPS = {  # the field that begins a group of flags -> its title
    "model_name": "model and data",
    "tp_size": "mesh",
    "batch_size_per_gpu": "training",
    "storage_path": "run",
}
DEFAULTS = {"model_name": "Qwen/Qwen2-7B"}
ONLY = {"autotp": "DeepSpeed: ", "fsdp": "FSDP2: "}  # prefix of its own fields' help


class Parser(argparse.ArgumentParser):
    """Refuses bad flags like everything else: in one line, with exit code 2."""

    def error(self, message: str):
        self.exit(2, f"error: {' '.join(message.split())}; see --help\n")


def build_parser(engine: str, description: str) -> argparse.ArgumentParser:
    """One flag for each field of TrainConfig that the engine reads.

    A flag that is not given sets no value, so that the file's or the demo's applies.
    """
    parser = Parser(description=description, argument_default=argparse.SUPPRESS)
    parser.add_argument("--config", metavar="FILE.yaml", help="values; flags override")
    parser.add_argument(
        "--offline_demo",
        action="store_true",
        help="train a tiny model on the CPU, without a network",
    )
    parser.add_argument(
        "--dry_run",
        action="store_true",
        help="check everything, print mesh, memory, traffic and steps, then exit",
    )
    hints = get_type_hints(TrainConfig)
    for f in fields(TrainConfig):
        if f.name in GROUPS:
            group = parser.add_argument_group(GROUPS[f.name])
        others = tuple(text for name, text in ONLY.items() if name != engine)
        if not f.metadata["help"].startswith(others):
            group.add_argument(
                f"--{FLAGS.get(f.name, f.name)}", dest=f.name, **options(f, hints)
            )
    group.add_argument(
        "--resume_from", metavar="RUN", help="resume the run with this run_name"
    )
    return parser


def options(f, hints: dict) -> dict[str, Any]:
    """The keyword arguments of ``add_argument`` for one field."""
    text = f.metadata["help"]
    for prefix in ONLY.values():
        text = text.removeprefix(prefix)
    default = "required" if f.name == "tp_size" else DEFAULTS.get(f.name, f.default)
    keywords: dict[str, Any] = {"help": text + f" ({default})" * (default is not None)}
    if hints[f.name] is bool:
        return keywords | {"action": argparse.BooleanOptionalAction}
    kinds = getattr(hints[f.name], "__args__", (hints[f.name],))
    keywords["type"] = next(kind for kind in (int, float, str) if kind in kinds)
    name = keywords["type"].__name__.upper()
    keywords["metavar"] = "|".join(f.metadata["choices"]) or name
    return keywords


def read_config(given: dict[str, Any]) -> TrainConfig:
    """Defaults, the demo's values, the run's to resume, the file's, then flags.

    Later ones override earlier ones.

    Raises:
        ConfigError: a value or a combination that is not allowed.
    """
    values: dict[str, Any] = dict(DEFAULTS)
    file = read_file(given.pop("config", None))
    run = given.pop("resume_from", None)
    if run is not None:
        check_run_name("resume_from", run)
    if given.pop("offline_demo", False):
        from tp2d_lib import presets

        storage = given.get("storage_path") or file.get("storage_path")
        storage = checked_storage(storage or presets.default_storage())
        values |= presets.preset_values("demo", storage) | {"device": "cpu"}
    if run is not None:
        values |= values_of_run(run, {**values, **file, **given})
    values |= file | given
    if "tp_size" not in values:
        raise ConfigError("tp_size must be given: ranks that share each layer; try 2")
    if run is not None:
        values["run_name"] = run
    config = TrainConfig(**values)
    if run is not None:
        check_run_exists(config)
    return config


def values_of_run(run: str, values: dict[str, Any]) -> dict[str, Any]:
    """What a run was last started with, from the configuration in its folder."""
    storage = checked_storage(values.get("storage_path") or TrainConfig.storage_path)
    path = Path(storage, run, "config.yaml")
    if not path.is_file():  # check_run_exists tells
        return {}
    stored = read_file(str(path))
    cache = stored.get("cache_dir") or f"{stored.get('storage_path')}/data"
    for name in ("prepared_data", "prepared_eval_data"):  # found again, or made
        if str(stored.get(name)).startswith(f"{cache}/"):
            del stored[name]
    for name in ("num_workers", "storage_path"):  # follow from the mesh; may have moved
        stored.pop(name, None)
    return stored


def checked_storage(value: Any) -> str:
    """A storage_path that is needed before all other values are known."""
    return TrainConfig(storage_path=value, cache_dir="/").storage_path


def read_file(path: str | None) -> dict[str, Any]:
    """A YAML file of field names, or of flags without their dashes.

    Of several documents the last one counts: a run's own ``config.yaml`` has one for
    each time the run was started.
    """
    if path is None:
        return {}
    try:
        text = Path(os.path.expanduser(path)).read_text("utf-8")
        documents = list(yaml.safe_load_all(text))
        values = (documents or [None])[-1] or {}
        if not isinstance(values, dict):
            raise ValueError(f"it holds a {type(values).__name__}, not keys")
    except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:
        raise ConfigError(
            f"config={path!r} must be a YAML file ({first_line(error)}); try the line "
            "'tp_size: 2'"
        ) from error
    names = {f.name: f.name for f in fields(TrainConfig)}
    names |= {flag: name for name, flag in FLAGS.items()}
    for key in values:
        if key not in names:
            raise ConfigError(
                f"{key!r} in config={path!r} must be a field of TrainConfig; "
                f"try {closest(key, names)!r}"
            )
    return {names[key]: value for key, value in values.items()}


def check_run_exists(config: TrainConfig) -> None:
    from tp2d_lib import checkpoint

    if checkpoint.last_of(config) is None:
        name, storage = config.run_name, config.storage_path
        runs = sorted(
            {path.parent.name for path in Path(storage).glob("*/checkpoint-*")}
        )
        raise ConfigError(
            f"resume_from={name!r} must be a run with a checkpoint in {storage}; "
            f"{'try ' + closest(name, runs) if runs else 'there is none yet'}"
        )


def main(engine: str, description: str, argv: list[str] | None = None) -> int:
    """Run a command; returns 0: done, 2: bad input, 1: training failed or stopped.

    Args:
        engine: the module with the engine, "fsdp" or "autotp".
        description: the first line of ``--help``.
    """
    argv = sys.argv[1:] if argv is None else argv
    given = vars(build_parser(engine, description).parse_args(argv))
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # like Ctrl-C
    try:
        return run_command(engine, given, argv)
    except (KeyboardInterrupt, SystemExit):  # the latter from Ray while it starts
        print("stopped: before training; nothing was saved", file=sys.stderr)
        return 1


def run_command(engine: str, given: dict[str, Any], argv: list[str]) -> int:
    from tp2d_lib import launch
    from tp2d_lib.checkpoint import CheckpointError
    from tp2d_lib.model import PlanError

    launch.quiet()
    is_dry_run = given.pop("dry_run", False)
    try:
        config = read_config(given)
        module = importlib.import_module(f"tp2d_lib.{engine}")
        config = replace(config, device=pick_device(config, is_dry_run))
        config = launch.prepare(module.check(config))
        if is_dry_run:
            return dry_run(engine, config)
        return train(module.train_func, config, argv)
    except (CheckpointError, ConfigError, PlanError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def pick_device(config: TrainConfig, is_dry_run: bool) -> str:
    """In a dry run, too few GPUs only cause a note, so that a laptop can predict."""
    from tp2d_lib import launch

    try:
        return launch.pick_device(config)
    except ConfigError as error:
        if not is_dry_run:
            raise
        print(f"note: {error}", file=sys.stderr)
        return "cuda"


def dry_run(engine: str, config: TrainConfig) -> int:
    from tp2d_lib import data
    from tp2d_lib.cost import dryrun

    rows = data.BatchLoader(config, Path(config.prepared_data), dp_rank=0)
    print(dryrun.report(config, dryrun.predict(engine, config), rows))
    return 0


def train(train_func, config: TrainConfig, argv: list[str]) -> int:
    from tp2d_lib import attempts, checkpoint, launch

    print(launch.as_yaml(config), flush=True)
    try:
        result = launch.train(train_func, config)
    except (attempts.Failed, attempts.Stopped) as error:
        print(report(error, config, argv), file=sys.stderr)
        return 1
    last = checkpoint.history(result)[-1]
    print(
        f"done: step {last['step']}, loss {last['loss']:.4f}, {result.checkpoint.path}"
    )
    return 0


def report(error: Exception, config: TrainConfig, argv: list[str]) -> str:
    """What failed first and where, what is saved, and the command that resumes."""
    from tp2d_lib import checkpoint, launch

    kind = type(error).__name__.lower()  # failed, or stopped
    lines = [f"{kind}: {error}", launch.saved(config)]
    if checkpoint.last_of(config):
        kept = without(argv, ("--run_name", "--resume_from"))
        again = shlex.join([*kept, "--resume_from", config.run_name])
        lines.append(f"to resume: python {shlex.quote(sys.argv[0])} {again}")
    return "\n".join(lines)


def without(argv: list[str], flags: tuple[str, ...]) -> list[str]:
    """The arguments without these flags and their values."""
    kept, skip = [], False
    for argument in argv:
        if skip:
            skip = False
        elif argument in flags:
            skip = True
        elif not argument.startswith(tuple(f"{flag}=" for flag in flags)):
            kept.append(argument)
    return kept
