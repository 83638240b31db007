"""Shared by the tests of rows and of their order."""

import pytest

from tests.support.texts import SEQ
from tp2d_lib.config import TrainConfig


@pytest.fixture
def make(demo_paths, tmp_path):
    """``make(**settings)``: a config of the demo model with its rows in tmp_path."""
    base = {
        "model_name": demo_paths[0],
        "dataset_name": demo_paths[1],
        "seq_length": SEQ,
        "cache_dir": str(tmp_path / "rows"),
    }
    return lambda **settings: TrainConfig(**{**base, **settings})
