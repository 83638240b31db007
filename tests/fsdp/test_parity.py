"""Training on a mesh equals training in one process: losses, norms, every weight."""

import itertools

import pytest
import torch
import torch.distributed as dist

from tests.support.models import CONFIGS, write_model
from tests.support.parity import (
    MAX_GRAD_NORM,
    assert_weights_equal,
    make_config,
    make_steps,
    share_of,
    train_references,
)
from tp2d_lib.fsdp import plan

GROUPS = (1, plan.SMALLEST_GROUP)  # each layer by itself, or all at once

# (tp_size, dp_size, dp_replicate_size)
MESHES = [(2, 2, 1), (4, 1, 1), (2, 2, 2)]  # tests/pairs has smaller ones
CUBE = (2, 4, 2)  # eight ranks
# (rows, accumulation, optimizer): each pair of settings meets once
VARIANTS = [
    ("packed", 1, "sgd"),
    ("packed", 2, "adamw"),
    ("padded", 1, "adamw"),
    ("padded", 2, "sgd"),
]


def train_on_mesh(model_dir, sizes, variants, storage, settings):
    """Run by every rank: what reference.train returns, for each variant."""
    from tp2d_lib.fsdp import build_engine
    from tp2d_lib.mesh import build_mesh
    from tp2d_lib.run import health

    tp_size, dp_size, copies = sizes
    mesh = build_mesh(dp_size=dp_size, tp_size=tp_size)
    results = []
    for variant, smallest in zip(variants, itertools.cycle(GROUPS)):
        plan.SMALLEST_GROUP = smallest
        settings |= {"dp_replicate_size": copies}
        config = make_config(model_dir, storage, tp_size, dp_size, variant, **settings)
        engine = build_engine(config, mesh)
        losses, norms = [], []
        steps = make_steps(*variant[:2])
        for batch in share_of(steps, mesh, config.batch_size_per_gpu):
            loss, norm = engine.step(batch)
            losses.append(float(loss))
            norms.append(float(norm))
        health.check_replicas(engine, len(steps))
        weights = {
            name: weight.full_tensor().detach()
            for name, weight in engine.model.named_parameters()
        }
        results.append((losses, norms, weights))
    return results


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    return {name: write_model(name, folder) for name in CONFIGS}


@pytest.fixture(scope="module")
def references(models):
    return train_references(models, VARIANTS)


@pytest.mark.parametrize(
    ("name", "mesh"),
    [
        *(("qwen2-tied", mesh) for mesh in MESHES),
        *((name, (4, 1, 1)) for name in CONFIGS if name != "qwen2-tied"),
        pytest.param("qwen2-tied", CUBE, marks=pytest.mark.faults),
    ],
    ids=str,
)
def test_mesh_equals_one_process(name, mesh, models, references, pools, tmp_path):
    """One model meets every variant on every mesh; for others see test_families too."""
    tp_size, dp_size, copies = mesh
    variants = VARIANTS if name == "qwen2-tied" else VARIANTS[1:3]
    variants = VARIANTS[2:] if copies > 1 else variants
    answers = pools(tp_size * dp_size).run(
        train_on_mesh, models[name], mesh, variants, str(tmp_path), {}
    )
    for variant, *ranks in zip(variants, *answers, strict=True):
        expected = references[(name, *variant)]
        for got in ranks:  # the same numbers on every rank
            torch.testing.assert_close(got[0], expected[0], rtol=1e-5, atol=0)
            torch.testing.assert_close(got[1], expected[1], rtol=1e-4, atol=0)
        weights = ranks[0][2]
        assert weights.keys() == expected[2].keys()
        assert_weights_equal(weights, expected[2], variant)


def groups(tp_size, dp_size, copies):
    """Run by every rank: the ranks of its groups, by name."""
    from tp2d_lib.mesh import build_mesh, split_dp

    mesh = build_mesh(dp_size, tp_size)
    split = split_dp(mesh, copies)
    assert (split is mesh) == (copies == 1)
    return {
        name: dist.get_process_group_ranks(split.get_group(name))
        for name in split.mesh_dim_names
    }


def test_neighbors_shard_a_copy(pools):
    """Ranks are numbered node by node, so a copy stays inside one."""
    *_, last = pools(4).run(groups, 1, 4, 2)
    assert last == {"dp_replicate": [1, 3], "dp_shard": [2, 3], "tp": [3]}
    *_, last = pools(4).run(groups, 2, 2, 2)
    assert last == {"dp_replicate": [1, 3], "dp_shard": [3], "tp": [2, 3]}
    *_, last = pools(4).run(groups, 2, 2, 1)
    assert last == {"dp": [1, 3], "tp": [2, 3]}


def test_reference_clips_and_moves(references, models):
    """The comparison means something: gradients are clipped and weights move far."""
    from transformers import AutoModelForCausalLM

    for (name, *_), (_, norms, weights) in references.items():
        before = AutoModelForCausalLM.from_pretrained(models[name]).state_dict()
        assert max(norms) > MAX_GRAD_NORM
        for key, weight in weights.items():
            moved = (weight - before[key]).abs().max()
            assert moved > 10 * 1e-4, (name, key, moved)
