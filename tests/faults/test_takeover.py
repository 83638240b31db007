"""A run that another process took over, because its driver seemed to be dead."""

import json
import time

import pytest
import ray

from tests.support.demo import train_with
from tp2d_lib import checkpoint, fsdp
from tp2d_lib.checkpoint import lease, storage
from tp2d_lib.presets import build_config
from tp2d_lib.run import launch
from tp2d_lib.run.attempts import Failed

pytestmark = pytest.mark.faults


@pytest.fixture(scope="module")
def cluster():
    yield
    ray.shutdown()


def loses_its_lease(config):
    """At step 3, after a checkpoint; a run named "slow" then computes for long."""

    def change(compute, loader):
        def step(batch):
            if loader.step == 3:
                other = lease.read(config) | {"holder": "another"}
                storage.write(config, lease.LEASE, json.dumps(other).encode())
                time.sleep(1000 * (config.run_name == "slow"))
            return compute(batch)

        return step

    train_with(config, change)


@pytest.mark.parametrize("name", ["slow", "quick"])
def test_it_ends_without_another_checkpoint(cluster, tmp_path, name):
    """The driver finds out and kills a slow one; a quick one finds out as it saves."""
    settings = {"max_steps": 8, "checkpoint_every": 2, "run_name": name}
    config = build_config("demo", str(tmp_path), device="cpu", **settings)
    with pytest.raises(Failed, match=f"LeaseLost: run_name='{name}' was taken over"):
        launch.run(loses_its_lease, config, fsdp.check)
    assert checkpoint.last_of(config).endswith("checkpoint-000002")
    assert lease.read(config)["holder"] == "another"  # and the lease is left alone
