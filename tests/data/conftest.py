"""Shared by the tests of rows and of their order."""

import pytest

from tests.support.chats import write_chat_model
from tests.support.texts import SEQ, write_lines
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


@pytest.fixture
def chat(make, tmp_path):
    """``chat(style, documents)``: a configuration of rows of one document each."""

    def build(style: str, documents: list[dict], marked=False, **settings):
        folder = tmp_path / "chats"
        write_lines(folder, documents)
        path = tmp_path / f"{style}{'-marked' * marked}"
        base = make().model_name
        model = str(path) if path.exists() else None
        return make(
            model_name=model or write_chat_model(base, tmp_path, style, marked),
            dataset_name=str(folder),
            **{"pack": "none", "seq_length": 256, **settings},
        )

    return build
