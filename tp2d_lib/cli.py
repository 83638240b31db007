"""The command line of both engines: exit codes, errors in one sentence.

Slow modules are imported inside functions, so that ``--help`` does not wait for them.
"""

from __future__ import annotations

import functools
import importlib
import shlex
import signal
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

from tp2d_lib.config import ConfigError, TrainConfig, closest
from tp2d_lib.flags import PLAN, build_parser, read_config


def main(engine: str, description: str, argv: list[str] | None = None) -> int:
    """Run a command; returns 0: done, 2: bad input, 1: training failed or stopped.

    Args:
        engine: the module with the engine, "fsdp" or "autotp".
        description: the first line of ``--help``.
    """
    argv = sys.argv[1:] if argv is None else argv
    given = vars(build_parser(engine, description).parse_args(argv))
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # like Ctrl-C
    if signal.getsignal(signal.SIGINT) is signal.SIG_DFL:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        return run_command(engine, given, argv)
    except (KeyboardInterrupt, SystemExit):  # the latter from Ray while it starts
        print("stopped: before training; nothing was saved", file=sys.stderr)
        return 1


def run_command(engine: str, given: dict[str, Any], argv: list[str]) -> int:
    from tp2d_lib.checkpoint import CheckpointError
    from tp2d_lib.model import PlanError
    from tp2d_lib.run import launch

    launch.quiet()
    is_dry_run, ranks = given.pop("dry_run", False), given.pop("plan_mesh", None)
    plan = {name: given.pop(name, None) for name in PLAN}
    pip = given.pop("pip", None)
    try:
        cluster = read_plan(ranks, plan)
        if ranks is not None:
            given |= {"tp_size": 1, "dp_size": ranks}
        config = read_config(given)
        module = import_engine(engine)
        if pip is not None:
            launch.connect(pip)
        predicts = is_dry_run or ranks is not None
        device = "cuda" if cluster else pick_device(config, predicts)
        config = replace(config, device=device)
        config = replace(config, dtype=launch.pick_dtype(config))
        if ranks is not None:
            check = functools.partial(module.check, plan=True)
            return plan_mesh(engine, config, check, cluster, plan["gpu_hour_price"])
        config = launch.prepare(module.check(config))
        if is_dry_run:
            return dry_run(engine, config)
        return train(module.train_func, config, argv)
    except (CheckpointError, ConfigError, PlanError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def import_engine(name: str):
    """The engine's module.

    Raises:
        ConfigError: DeepSpeed, which an installation may do without, is needed.
    """
    try:
        return importlib.import_module(f"tp2d_lib.{name}")
    except ModuleNotFoundError as error:
        if error.name != "deepspeed":
            raise
        raise ConfigError(
            "train_deepspeed.py must find the package deepspeed, which is not "
            "installed; try pip install deepspeed, or train_fsdp.py"
        ) from error


def read_plan(ranks: int | None, plan: dict[str, Any]):
    """The cluster that ``--plan_mesh`` estimates speeds for, if a GPU is named.

    Raises:
        ConfigError: a value that is not allowed, or a flag that needs another.
    """
    if ranks is not None and ranks < 1:
        raise ConfigError(f"plan_mesh={ranks} must be positive; try 8")
    given = {name: value for name, value in plan.items() if value is not None}
    for name, value in given.items():
        if ranks is None:
            raise ConfigError(f"{name}={value} needs plan_mesh; try --plan_mesh 8")
        if "plan_gpu" not in given:
            raise ConfigError(f"{name}={value} needs plan_gpu; try --plan_gpu H100")
        if name != "plan_gpu" and not value > 0:
            raise ConfigError(f"{name}={value} must be positive; leave it out")
    if not given:
        return None
    from tp2d_lib.cost import times
    from tp2d_lib.run import gpus

    gpu = gpus.find(plan["plan_gpu"])
    if not gpu:
        raise ConfigError(
            f"plan_gpu={plan['plan_gpu']} must be one of {', '.join(gpus.GPUS)}; "
            f"try {closest(plan['plan_gpu'], gpus.GPUS)}"
        )
    network = (plan["plan_network"] or 400) / 8 * 1e9
    per_node = plan["plan_gpus_per_node"] or 8
    # Boards of four with NVLink have no switch; on PCIe there is nothing to share.
    switched = per_node != 4 or gpu.link < 100e9
    return times.Cluster(gpu, per_node, network, switched)


def pick_device(config: TrainConfig, is_dry_run: bool) -> str:
    """In a dry run, too few GPUs only cause a note, so that a laptop can predict."""
    from tp2d_lib.run import launch

    try:
        return launch.pick_device(config)
    except ConfigError as error:
        if not is_dry_run:
            raise
        print(f"note: {error}", file=sys.stderr)
        return "cuda"


def plan_mesh(engine: str, config: TrainConfig, check, cluster, price) -> int:
    from tp2d_lib import data
    from tp2d_lib.cost import dryrun, meshes

    data_rows, told = None, []
    if cluster:
        try:
            data_rows = data.prepare(config)
            told = [f"hours are those of training: {data.describe(data_rows)}"]
        except ConfigError as error:  # a mesh can be chosen before there is any data
            told = [f"no hours: {error}"]
        told.append(meshes.assumed(cluster))
    rows, refused = meshes.compare(engine, config, check, cluster, data_rows, price)
    table = [dryrun.aligned(dryrun.as_cells(rows))] if rows else []
    print(*table, *refused, *told, sep="\n")
    return 0


def dry_run(engine: str, config: TrainConfig) -> int:
    from tp2d_lib import data
    from tp2d_lib.cost import dryrun

    rows = data.BatchLoader(config, Path(config.prepared_data), dp_rank=0)
    print(dryrun.report(config, dryrun.predict(engine, config), rows))
    return 0


def train(train_func, config: TrainConfig, argv: list[str]) -> int:
    from tp2d_lib import checkpoint, store
    from tp2d_lib.checkpoint import manifest
    from tp2d_lib.run import attempts, launch

    print(summary(config), flush=True)
    try:
        result = launch.train(train_func, config)
    except (attempts.Failed, attempts.Stopped) as error:
        print(report(error, config, argv), file=sys.stderr)
        return 1
    last = checkpoint.history(result)[-1]
    where = store.from_ray(result.checkpoint)
    losses = f"loss {last['loss']:.4f}"
    if "eval_loss" in last:
        losses += f", validation loss {last['eval_loss']:.4f}"
    print(f"done: step {last['step']}, {losses}, {where}")
    print(f"curves: tensorboard --logdir {manifest.run_folder(config) / 'tensorboard'}")
    return 0


def summary(config: TrainConfig) -> str:
    """What will run where on what, in a few lines; the rest is in the run's folder."""
    from tp2d_lib import data, model
    from tp2d_lib.checkpoint import manifest

    empty = model.build_empty_model(config)
    size = sum(parameter.numel() for parameter in empty.parameters())
    rows = data.BatchLoader(config, Path(config.prepared_data), dp_rank=0)
    device = {"cuda": "GPU", "cpu": "CPU"}[config.device]
    return "\n".join(
        [
            f"model: {config.model_name}, {size:,} parameters, {config.dtype}",
            f"mesh: tp {config.tp_size} x dp {config.dp_size}, {device} ranks",
            f"rows: {rows.size:,} of {config.seq_length} tokens, "
            f"{config.global_batch_size} in each of {rows.steps_left:,} steps",
            f"run: {manifest.run_folder(config)}, with all settings in config.yaml",
        ]
    )


def report(error: Exception, config: TrainConfig, argv: list[str]) -> str:
    """What failed first and where, what is saved, and the command that resumes."""
    from tp2d_lib.run import launch

    kind = type(error).__name__.lower()  # failed, or stopped
    lines = [f"{kind}: {error}", saved := launch.saved(config)]
    if saved != launch.NOTHING_SAVED:
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
