"""Shared by all tests: offline, quiet, one demo model, groups of ranks kept warm."""

import os
import shutil
import tempfile

os.environ["HF_HUB_OFFLINE"] = "1"  # before anything imports huggingface_hub
os.environ["RAY_ADDRESS"] = "local"  # a cluster of our own
os.environ["HF_DATASETS_CACHE"] = tempfile.mkdtemp(prefix="tp2d-tests-")
os.environ["TOKENIZERS_PARALLELISM"] = "false"

import pytest
import transformers

from tests.support.pool import Pool
from tp2d_lib.data import demo

transformers.logging.disable_progress_bar()


@pytest.fixture(scope="session")
def demo_paths(tmp_path_factory):
    """The demo model and dataset, as (model_name, dataset_name)."""
    return demo.write(tmp_path_factory.mktemp("demo") / "files")


@pytest.fixture(scope="module")
def pools():
    """``pools(n)``: n processes in one gloo group, started once for a file's tests.

    Tests that name a group of their own share it with nobody else. All end with the
    file: a dozen idle processes would slow down the notebooks' tests.
    """
    started = {}

    def pool(world_size: int, name: str = "") -> Pool:
        if (world_size, name) not in started:
            started[world_size, name] = Pool(world_size)
        return started[world_size, name]

    yield pool
    for each in started.values():
        each.close()


# Fixtures that start ranks, and the files that take longest.
RANKS = {"pools", "groups", "cluster", "execute", "whole", "predictions"}
LONGEST = ("test_notebooks", "test_cli", "test_pairs", "test_options", "test_parity")


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items):
    """Mark what starts ranks; the longest files first, so that no process waits."""
    for item in items:
        if not RANKS.isdisjoint(item.fixturenames):
            item.add_marker(pytest.mark.ranks)
    items.sort(key=lambda item: (*LONGEST, item.path.stem).index(item.path.stem))


def pytest_sessionfinish():
    shutil.rmtree(os.environ["HF_DATASETS_CACHE"], ignore_errors=True)
