"""Names of runs and numbers that would fail later, and not in one sentence."""

import pytest

from tests.test_config import proposal, refuse, refuse_field
from tp2d_lib.config import ConfigError, TrainConfig
from tp2d_lib.flags import read_config


@pytest.mark.parametrize(
    "value", ["../x", "/tmp/x", ".x", "-x", "a/b", "a b", "ünï", "x" * 101, "x\n"]
)
def test_a_run_name_is_one_plain_folder(value):
    refuse_field(TrainConfig, "run_name", value, "must begin with a letter or digit")
    with pytest.raises(ConfigError, match=r"^resume_from='.*like run-1;"):
        read_config({"resume_from": value, "tp_size": 2})
    assert TrainConfig(run_name="x" * 100).run_name
    assert TrainConfig(run_name="Run_1.b-2").run_name


@pytest.mark.parametrize(
    "field", ["learning_rate", "weight_decay", "max_grad_norm", "warmup_steps"]
)
def test_infinite(field):
    message = refuse_field(TrainConfig, field, float("inf"), "must be")
    TrainConfig(**{field: proposal(message)})


def test_numbers_too_large_and_text_that_cannot_be_shown():
    long = "(an integer of 16610 bits) must be less than"
    assert long in refuse(TrainConfig, seed=10**5000)
    assert "must be" in refuse(TrainConfig, learning_rate=10**5000)
    refuse_field(TrainConfig, "storage_path", "~\0", "must be printable text")
    refuse(TrainConfig, tp_size=2**62 - 1, num_workers=4)  # at once
