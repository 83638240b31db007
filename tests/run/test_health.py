"""Runs on live ranks that stop, or skip, what is not finite; drifting copies."""

from dataclasses import replace
from importlib import import_module

import pytest
import torch

from tests.support.demo import make_config
from tp2d_lib import autotp, data
from tp2d_lib.config import ConfigError
from tp2d_lib.data import build_dataloader
from tp2d_lib.mesh import build_mesh
from tp2d_lib.run import health
from tp2d_lib.run.metrics import Metrics

BAD_STEP = 2


def poison(engine, loader, dp_rank):
    """Make one dp rank's loss of one step NaN, before backward."""
    forward = engine.model.forward

    def poisoned(*args, **kwargs):
        answer = forward(*args, **kwargs)
        bad = loader.step == BAD_STEP and loader.dp_rank == dp_rank
        answer.loss = answer.loss * (float("nan") if bad else 1.0)
        return answer

    engine.model.forward = poisoned


def weights_of(engine):
    return {name: weight.clone() for name, weight in engine.local_weights().items()}


def train(kind, config, mode):
    """Run by every rank: three steps, the second of them poisoned on dp rank 1."""
    config = replace(config, nonfinite=mode)
    mesh = build_mesh(config.dp_size, config.tp_size, config.device)
    engine = import_module(f"tp2d_lib.{kind}").build_engine(config, mesh)
    loader = build_dataloader(config, mesh)
    poison(engine, loader, dp_rank=1)
    notices: list = []
    metrics = Metrics(engine, config, 0, [], notices.append)
    try:
        for step, batch in enumerate(loader, start=1):
            before = weights_of(engine)
            metrics.add(batch, *engine.step(batch))
            after = weights_of(engine)
            same = all(torch.equal(before[name], after[name]) for name in before)
            if mode == "skip":
                assert same == (step == BAD_STEP)
        metrics.log(step, 0.1, loader)
        health.check_weights(engine, step)
    except health.NonFiniteError as error:
        return str(error), notices
    return metrics.history, notices


@pytest.fixture
def config(demo_paths, tmp_path):
    config = make_config(demo_paths, tmp_path, 2, 2, max_steps=3)
    return replace(config, prepared_data=str(data.prepare(config)))


@pytest.mark.parametrize("kind", ["fsdp", "autotp"])
def test_a_step_that_is_not_finite_stops_or_is_skipped(kind, config, pools):
    loader = data.BatchLoader(config, data.prepare(config), dp_rank=1)
    rows = loader.share_at(config.global_batch_size).tolist()
    ranks = pools(4, kind)
    for said, _ in ranks.run(train, kind, config, "stop"):
        assert said.startswith("step 2 has loss nan and gradient norm")
        assert f"; dp rank 1 read rows {rows}; both must be finite" in said
    for history, notices in ranks.run(train, kind, config, "skip"):
        (record,) = history
        assert record["step"] == 3
        assert 0 < record["loss"] < 8
        told = [r["notice"] for r in notices if "notice" in r]
        assert [text.split(" has ")[0] for text in told] == ["step 2"]
        assert told[0].endswith("; skipped")


def drift(kind, config, axis):
    """Run by every rank: change one bit of one weight of the last rank on the axis."""
    mesh = build_mesh(config.dp_size, config.tp_size, config.device)
    engine = import_module(f"tp2d_lib.{kind}").build_engine(config, mesh)
    health.check_replicas(engine, 1)
    health.check_weights(engine, 1)
    groups = {group.mesh_dim_names[0]: (group, w) for group, w in engine.replicas()}
    assert all(weights for _, weights in groups.values())
    group, weights = groups[axis]
    name, weight = next(iter(weights.items()))
    last = group.get_local_rank() == group.size() - 1
    if last and (axis == "tp" or mesh["tp"].get_local_rank() == 0):
        weight.view(torch.int32).view(-1)[0] ^= 1 << (21 if axis == "tp" else 0)
    try:
        health.check_replicas(engine, 2)
    except health.DriftError as error:
        return name, str(error)
    return name, None


@pytest.mark.parametrize(
    ("kind", "axis"),
    [("fsdp", "tp"), ("fsdp", "dp_replicate"), ("autotp", "tp"), ("autotp", "dp")],
)
def test_copies_that_drift_apart_stop_the_run(kind, axis, config, pools):
    if axis == "dp_replicate":
        config = replace(config, dp_replicate_size=2)
    answers = pools(4, kind).run(drift, kind, config, axis)
    for name, answer in answers:
        assert answer.startswith(
            f"{name!r} must be equal on all {axis} ranks, but differs after step 2"
        )


def infinite(kind, config):
    mesh = build_mesh(config.dp_size, config.tp_size, config.device)
    engine = import_module(f"tp2d_lib.{kind}").build_engine(config, mesh)
    if mesh.get_rank() == 3:
        next(iter(engine.local_weights().values())).view(-1)[0] = float("inf")
    with pytest.raises(health.NonFiniteError, match="must be finite to be saved"):
        health.check_weights(engine, 1)


@pytest.mark.parametrize("kind", ["fsdp", "autotp"])
def test_weights_that_are_not_finite_are_not_saved(kind, config, pools):
    pools(4, kind).run(infinite, kind, config)


def test_zero_stage_0_cannot_skip(config):
    with pytest.raises(ConfigError, match=r"nonfinite='skip' cannot .* zero_stage=1"):
        autotp.check(replace(config, nonfinite="skip", zero_stage=0))


def test_bits_that_cancel_in_a_sum_of_values_are_seen():
    one = torch.tensor([1.0, -1.0])
    other = torch.tensor([2.0, -2.0])
    assert one.sum() == other.sum()
    assert health.bit_sum(one) != health.bit_sum(other)
