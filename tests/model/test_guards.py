"""A gradient that is not summed over tp stops the run, and is named."""

import torch

from tests.support.demo import make_config
from tp2d_lib.model import PlanError
from tp2d_lib.model.guards import check_replicated_gradients


def tampered_step(config, factor):
    """Run by every rank: a norm whose gradient one tp rank sees differently."""
    from tp2d_lib.data import build_dataloader
    from tp2d_lib.fsdp import build_engine
    from tp2d_lib.fsdp.engine import forward_backward
    from tp2d_lib.mesh import build_mesh

    mesh = build_mesh(config.dp_size, config.tp_size)
    engine = build_engine(config, mesh)
    (micro,) = next(iter(build_dataloader(config, mesh)))
    forward_backward(engine, micro, torch.tensor(100))
    name = "model.layers.1.input_layernorm.weight"
    gradient = dict(engine.model.named_parameters())[name].grad
    gradient.to_local().mul_(1 + factor * mesh["tp"].get_local_rank())
    try:
        engine.check_first_gradients()
    except PlanError as error:
        return str(error)


def test_partial_gradient_stops_the_run(demo_paths, pools, tmp_path):
    config = make_config(demo_paths, tmp_path, 2, 2)
    assert pools(4).run(tampered_step, config, 0.0) == [None] * 4
    for message in pools(4).run(tampered_step, config, 0.01):
        assert "gradient of 'model.layers.1.input_layernorm.weight'" in message


def test_gradients_without_replicated_parameters():
    check_replicated_gradients({}, group=None)  # tp_size 1: nothing to compare


def compare_gradients(values):
    """Run by every rank: what the check says of one gradient."""
    import torch.distributed as dist

    return check_replicated_gradients({"w": torch.tensor(values)}, dist.group.WORLD)


def test_overflowed_gradients_are_compared_later(pools):
    """float16 starts with infinities: they tell nothing, and the check must wait."""
    assert pools(2).run(compare_gradients, [1.0, float("inf")]) == [False] * 2
    assert pools(2).run(compare_gradients, [1.0, 2.0]) == [True] * 2
