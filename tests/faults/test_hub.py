"""The commands and a Hub: a model that cannot be had is refused in the driver."""

import sys

import pytest

from tests.support.commands import ROOT, finish, run
from tests.support.hub import GATED, Hub


@pytest.fixture
def hub():
    with Hub() as server:
        yield server
        server.shutdown()


@pytest.fixture
def train(hub, demo_paths, tmp_path):
    """The command with a model of this Hub, and a cache of its own."""

    def start(script="train_fsdp.py", **environment):
        flags = {
            "model_name": "someone/demo",
            "dataset_name": demo_paths[1],
            "storage_path": str(tmp_path / "runs"),
            "seq_length": 64,
            "tp_size": 2,
            "max_steps": 1,
            "device": "cpu",
        }
        command = [sys.executable, str(ROOT / script)]
        for name, value in flags.items():
            command += [f"--{name}", str(value)]
        own = {"HF_ENDPOINT": hub.url, "HF_HUB_OFFLINE": "0", **environment}
        return run(command, HF_HOME=str(tmp_path / "home"), **own)

    return start


@pytest.mark.faults
@pytest.mark.parametrize("script", ["train_fsdp.py", "train_deepspeed.py"])
def test_a_model_of_the_hub(hub, train, demo_paths, script):
    """Driver and workers together download each file once, and then need no Hub."""
    repository = hub.add("someone/demo", demo_paths[0])
    finish(train(script))
    assert set(repository.downloads().values()) == {1}
    finish(train(script, HF_HUB_OFFLINE="1"))
    assert not repository.requests


@pytest.mark.faults
def test_a_gated_model_is_refused_in_the_driver(hub, train, demo_paths, tmp_path):
    hub.add("someone/demo", demo_paths[0]).refusal = (401, GATED)
    _, err = finish(train(), code=2)
    assert err.startswith("error: model_name='someone/demo' must be open to you, but ")
    assert len(err.splitlines()) == 1
    assert not (tmp_path / "runs").exists()


@pytest.mark.faults
def test_a_hub_out_of_reach_is_told_in_the_driver(train, tmp_path):
    _, err = finish(train(HF_ENDPOINT="http://127.0.0.1:9"), code=2)
    sentence = err.splitlines()[-1]
    assert sentence.startswith("error: model_name='someone/demo' must be on the Hub at")
    assert "which cannot be reached now" in sentence
    assert err.endswith("try later, or HF_HUB_OFFLINE=1 if it is in the cache\n")
    assert not (tmp_path / "runs").exists()
