"""A gradient not summed over tp stops the run; sizes are those of config.json."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import BloomConfig, LlamaConfig

from tests.support.demo import make_config
from tp2d_lib.config import ConfigError
from tp2d_lib.model import PlanError
from tp2d_lib.model.guards import (
    check_replicated_gradients,
    check_sizes,
    longest_sequence,
)


def tampered_step(config, factor):
    """Run by every rank: a norm whose gradient one tp rank sees differently."""
    from tp2d_lib.data import build_dataloader
    from tp2d_lib.fsdp import build_engine
    from tp2d_lib.fsdp.step import forward_backward
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


YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0}
LINEAR = {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0}


@pytest.mark.parametrize(
    ("settings", "longest"),
    [
        ({}, 512),
        ({"rope_parameters": YARN | {"original_max_position_embeddings": 256}}, 1024),
        ({"rope_parameters": YARN | {"original_max_position_embeddings": 64}}, 512),
        ({"rope_parameters": LINEAR}, 1024),
        ({"rope_scaling": {"type": "dynamic", "factor": 3.0}}, 1536),  # as of old
    ],
)
def test_scaled_positions_reach_further(settings, longest):
    hf = LlamaConfig(max_position_embeddings=512, **settings)
    assert longest_sequence(hf) == longest


def test_without_positions_there_is_no_limit():
    assert longest_sequence(BloomConfig()) is None


def test_more_than_the_model_has_positions_for_is_refused(demo_paths, tmp_path):
    model = Path(shutil.copytree(demo_paths[0], tmp_path / "model"), "config.json")
    content = json.loads(model.read_text())
    limit = content["max_position_embeddings"]
    content["rope_parameters"] |= {"rope_type": "yarn", "factor": 2.0}
    model.write_text(json.dumps(content))
    paths = (str(model.parent), demo_paths[1])
    config = make_config(paths, tmp_path, 1, 1, device="cpu")
    check_sizes(replace(config, seq_length=2 * limit))
    with pytest.raises(ConfigError, match=f"at most {2 * limit}, the longest"):
        check_sizes(replace(config, seq_length=2 * limit + 1))
