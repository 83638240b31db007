"""Estimated times against those that others have published."""

from dataclasses import replace

import pytest

from tp2d_lib.cost import times
from tp2d_lib.lessons import published


def test_published_speeds_are_met():
    errors = {run: published.estimate(run) / run.speed - 1 for run in published.RUNS}
    assert max(map(abs, errors.values())) < 0.15, errors


def test_published_meshes_of_four_gpus_are_in_order():
    on_four = [run for run in published.RUNS if run.tp_size * run.dp_size == 4]
    assert [run.speed for run in on_four] == [9745.75, 6495, 6283.75]
    speeds = [published.estimate(run) for run in on_four]
    assert speeds == sorted(speeds, reverse=True)


def test_what_computation_is_too_short_to_hide_is_seen():
    node = published.CLUSTERS["H100"]
    per_second = node.gpu.flops * node.use
    short = times.step_seconds(
        node, 1, 8, flops=per_second, tp=0, dp=10 * node.speed(8)
    )
    assert short == pytest.approx(1 + 9)
    long = times.step_seconds(node, 1, 8, flops=per_second, tp=0, dp=node.speed(8))
    assert long == pytest.approx(1 + 0.25)


def test_speeds_of_links():
    node = published.CLUSTERS["H200"]
    assert node.speed(2) == pytest.approx(0.7 * 150e9)  # a third of the links
    assert node.speed(4) == pytest.approx(0.7 * 450e9)
    assert node.speed(2, apart=4) == node.speed(8) == pytest.approx(0.8 * 50e9)
    assert replace(node, switched=True).speed(2) == pytest.approx(0.7 * 450e9)
