"""From flags and YAML files to a TrainConfig.

Slow modules are imported inside functions, so that ``--help`` does not wait for them.
"""

from __future__ import annotations

import argparse
import os
import re
from contextlib import suppress
from pathlib import Path
from typing import Any

import yaml
from pydantic.fields import FieldInfo

from tp2d_lib import store
from tp2d_lib.config import FIELDS, ConfigError, TrainConfig, closest, first_line
from tp2d_lib.validation import choices, leaves

FLAGS = {"batch_size_per_gpu": "batch_size"}  # the published name, besides the field's
GROUPS = {  # the field that begins a group of flags -> its title
    "model_name": "model and data",
    "tp_size": "mesh",
    "batch_size_per_gpu": "training",
    "storage_path": "run",
}
DEFAULTS = {"model_name": "Qwen/Qwen2-7B"}
DROPPED = {  # settings of older releases, and what they were if nobody set them
    "decay_ratio": 0.1,
    "label_smoothing_factor": 0.0,
    "z_loss": 0.0,
    "report_to": None,
    "profile_steps": 0,
    "bf16_master_weights": False,
    "sync_each_batch": True,
    "tp_preset": None,
    "preprocessing_num_workers": None,
    "warmup_ratio": 0.03,
}
ONLY = {"autotp": "DeepSpeed: ", "fsdp": "FSDP2: "}  # prefix of its own fields' help
PLAN = {  # what goes with --plan_mesh: type, metavar, help
    "plan_gpu": (str, "NAME", "with --plan_mesh: speeds on such a GPU, say H100"),
    "plan_gpus_per_node": (int, "N", "with --plan_gpu: GPUs of a node (8)"),
    "plan_network": (float, "GBIT", "with --plan_gpu: Gb/s of a GPU to others (400)"),
    "gpu_hour_price": (float, "PRICE", "with --plan_gpu: adds what training costs"),
}


class Parser(argparse.ArgumentParser):
    """Refuses bad flags like everything else: in one line, with exit code 2."""

    def parse_args(self, argv: list[str], namespace=None) -> argparse.Namespace:
        """``--batch-size`` means ``--batch_size``; ``--no_x`` is written ``--no-x``."""
        argv = [re.sub(r"^--(no[-_])?([\w-]+)", as_declared, word) for word in argv]
        known, unknown = self.parse_known_args(argv, namespace)
        if unknown:
            flag = unknown[0].partition("=")[0]
            if flag.removeprefix("--") in FIELDS:
                self.error(f"{flag} is a flag of the other engine's command")
            if flag.removeprefix("--") in DROPPED:
                self.error(f"{flag} is no flag any more; CHANGELOG.md tells what is")
            flags = [name for name in self._option_string_actions if name[:2] == "--"]
            self.error(f"unknown argument {flag}; did you mean {closest(flag, flags)}?")
        return known

    def error(self, message: str):
        self.exit(2, f"error: {' '.join(message.split())}; see --help\n")


def as_declared(flag: re.Match) -> str:
    return "--" + "no-" * bool(flag[1]) + flag[2].replace("-", "_")


def build_parser(engine: str, description: str) -> argparse.ArgumentParser:
    """One flag for each field of TrainConfig that the engine reads.

    A flag that is not given sets no value, so that the file's or the demo's applies.
    """
    parser = Parser(
        description=description,
        argument_default=argparse.SUPPRESS,
        usage="%(prog)s --tp_size N [--config FILE.yaml] [--FIELD VALUE ...]",
    )
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
    parser.add_argument(
        "--plan_mesh",
        type=int,
        metavar="N",
        help="print memory and traffic on every mesh of N ranks, then exit",
    )
    pip = "requirements that Ray installs for the workers, on every node"
    parser.add_argument("--pip", metavar="FILE", help=pip)
    for name, (kind, metavar, text) in PLAN.items():
        parser.add_argument(f"--{name}", type=kind, metavar=metavar, help=text)
    others = tuple(text for name, text in ONLY.items() if name != engine)
    for name, field in FIELDS.items():
        if name in GROUPS:
            group = parser.add_argument_group(GROUPS[name])
        if not field.description.startswith(others):
            names = dict.fromkeys(f"--{n}" for n in (FLAGS.get(name, name), name))
            group.add_argument(*names, dest=name, **options(name, field))
    group.add_argument(
        "--resume_from", metavar="RUN", help="resume the run with this run_name"
    )
    return parser


def options(name: str, field: FieldInfo) -> dict[str, Any]:
    """The keyword arguments of ``add_argument`` for one field."""
    text = field.description.replace("%", "%%")
    for prefix in ONLY.values():
        text = text.removeprefix(prefix)
    default = "required" if name == "tp_size" else DEFAULTS.get(name, field.default)
    keywords: dict[str, Any] = {"help": text + f" ({default})" * (default is not None)}
    allowed = leaves(field.annotation)
    if bool in allowed:
        return keywords | {"action": argparse.BooleanOptionalAction}
    kind = next((kind for kind in (int, float) if kind in allowed), str)
    metavar = "|".join(choices(field.annotation)) or kind.__name__.upper()
    return keywords | {"type": kind, "metavar": metavar}


def read_config(given: dict[str, Any]) -> TrainConfig:
    """Defaults, the demo's values, the run's to resume, the file's, then flags.

    Later ones override earlier ones.

    Raises:
        ConfigError: a value or a combination that is not allowed.
    """
    values: dict[str, Any] = dict(DEFAULTS)
    path = given.pop("config", None)
    file = {} if path is None else values_in(path)
    run = given.pop("resume_from", None)
    if run is not None:
        try:
            TrainConfig(run_name=run)
        except ConfigError as error:
            raise ConfigError(
                f"{error}".replace("run_name", "resume_from", 1)
            ) from None
        if (name := given.get("run_name", run)) != run:
            raise ConfigError(
                f"run_name={name!r} cannot be combined with resume_from={run!r}, which "
                "names the run to go on with; to begin another run where that one is, "
                "try resume_from_checkpoint with a folder of it"
            )
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
    if run is None:
        return TrainConfig(**values)
    config = TrainConfig(**values | {"run_name": run})
    check_run_exists(config)
    return config


def values_of_run(run: str, values: dict[str, Any]) -> dict[str, Any]:
    """What a run was last started with, from the configuration in its folder."""
    storage = checked_storage(values.get("storage_path") or TrainConfig.storage_path)
    path = store.path(storage) / run / "config.yaml"
    try:
        stored = values_in(path) if path.is_file() else {}  # check_run_exists tells
    except OSError as error:
        raise ConfigError(
            f"storage_path={storage!r} must be readable ({first_line(error)}); try "
            "another one, or its credentials"
        ) from error
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


def values_in(path: str | Path | store.RemotePath) -> dict[str, Any]:
    """A YAML file of field names, or of flags without their dashes.

    Of several documents the last one counts: a run's own ``config.yaml`` has one for
    each time the run was started.
    """
    try:
        local = path if not isinstance(path, str) else Path(os.path.expanduser(path))
        text = local.read_text("utf-8")
        documents = list(yaml.safe_load_all(text))
        values = (documents or [None])[-1] or {}
        if not isinstance(values, dict):
            raise ValueError(f"it holds a {type(values).__name__}, not keys")
    except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:
        raise ConfigError(
            f"config={str(path)!r} must be a YAML file ({first_line(error)}); try the "
            "line 'tp_size: 2'"
        ) from error
    names = {name: name for name in FIELDS} | {flag: n for n, flag in FLAGS.items()}
    values = {k: v for k, v in values.items() if (k, v) not in DROPPED.items()}
    for key in values:
        if key in DROPPED:
            raise ConfigError(
                f"{key}={values[key]!r} in config={str(path)!r} must be left out: it "
                "is not a setting any more; CHANGELOG.md tells what is"
            )
        if key not in names:
            raise ConfigError(
                f"{key!r} in config={str(path)!r} must be a field of TrainConfig; "
                f"try {closest(key, names)!r}"
            )
    return {names[key]: number(names[key], value) for key, value in values.items()}


def number(name: str, value: Any) -> Any:
    """The value of a field; YAML 1.1 takes 1e-5, without a point, for text."""
    if isinstance(value, str) and type(getattr(TrainConfig, name)) is float:
        with suppress(ValueError):  # the field's check has the better sentence
            return float(value)
    return value


def check_run_exists(config: TrainConfig) -> None:
    from tp2d_lib import checkpoint

    if checkpoint.last_of(config) is None:
        name, storage = config.run_name, config.storage_path
        home = store.path(storage)
        runs = [
            run
            for run in sorted(store.names(home))
            if any(name.startswith("checkpoint-") for name in store.names(home / run))
        ]
        raise ConfigError(
            f"resume_from={name!r} must be a run with a checkpoint in {storage}; "
            f"{'try ' + closest(name, runs) if runs else 'there is none yet'}"
        )
