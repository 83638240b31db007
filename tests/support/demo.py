"""The demo model: one global batch on every mesh, and a run without Ray."""

from importlib import import_module

from tests.support.commands import shards
from tp2d_lib import fsdp
from tp2d_lib.config import TrainConfig
from tp2d_lib.data import build_dataloader
from tp2d_lib.mesh import build_mesh
from tp2d_lib.presets import build_config
from tp2d_lib.run import launch, loop
from tp2d_lib.run.schedule import learning_rate

GLOBAL_BATCH = 4


def make_config(paths, storage, tp_size, dp_size, **settings):
    return TrainConfig(
        model_name=paths[0],
        dataset_name=paths[1],
        tp_size=tp_size,
        dp_size=dp_size,
        seq_length=64,
        batch_size_per_gpu=GLOBAL_BATCH // dp_size,
        learning_rate=1e-2,
        storage_path=str(storage),
        **settings,
    )


def uninterrupted(pools, storage, **settings) -> dict[str, str]:
    """The shards of a run on two tp ranks that nothing interrupts, by checksum."""
    config = build_config("demo", str(storage), tp_size=2, **settings)
    config = launch.prepare(fsdp.check(config))
    pools(2).run(train_without_ray, "fsdp", config, str(storage / "whole"))
    return shards(storage / "whole")


def train_with(config, change, engine=fsdp):
    """Run by every worker of Ray: training whose step is ``change(step, loader)``."""
    mesh = build_mesh(config.dp_size, config.tp_size, config.device)
    built = engine.build_engine(config, mesh)
    loader = build_dataloader(config, mesh)
    built.step = change(built.step, loader)
    loop.run(built, loader, config)


def train_without_ray(engine, config, folder, finish="save"):
    """Run by every rank: all steps of a run in a loop of its own, then its shards.

    Or, with ``finish="export"``, the model.
    """
    mesh = build_mesh(config.dp_size, config.tp_size, config.device)
    built = import_module(f"tp2d_lib.{engine}").build_engine(config, mesh)
    loader = build_dataloader(config, mesh)
    total, figures = loader.steps_left, []
    for step, batch in enumerate(loader, start=1):
        for group in built.optimizer.param_groups:
            group["lr"] = learning_rate(step, total, config)
        figures.append(tuple(map(float, built.step(batch))))
    getattr(built, finish)(folder)
    return figures
