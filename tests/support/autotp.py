"""Training with the DeepSpeed engine, as its tests do it on every rank."""

import torch

from tests.support.parity import make_config as mesh_config
from tests.support.parity import make_steps, share_of

STAGES = (0, 1, 2, 3)


def make_config(model_dir, storage, tp_size, dp_size, stage, variant):
    return mesh_config(model_dir, storage, tp_size, dp_size, variant, zero_stage=stage)


def train(config, rows, folder, resume=True):
    """Run by every rank: losses and norms; the same again from a checkpoint halfway."""
    from tp2d_lib.autotp import build_engine
    from tp2d_lib.mesh import build_mesh

    mesh = build_mesh(config.dp_size, config.tp_size)
    steps = make_steps(rows, config.gradient_accumulation_steps)
    batches = share_of(steps, mesh, config.batch_size_per_gpu)
    engine = build_engine(config, mesh)
    half = len(batches) // 2
    whole = [tuple(map(float, engine.step(batch))) for batch in batches[:half]]
    engine.save(f"{folder}/checkpoint")
    whole += [tuple(map(float, engine.step(batch))) for batch in batches[half:]]
    engine.export(f"{folder}/export")
    if not resume:
        return whole, None
    again = build_engine(config, mesh)
    again.load(f"{folder}/checkpoint")
    resumed = [tuple(map(float, again.step(batch))) for batch in batches[half:]]
    same = all(
        torch.equal(a, b)
        for a, b in zip(
            engine.model.parameters(), again.model.parameters(), strict=True
        )
    )
    return whole, resumed == whole[half:] and same
