"""Options that change how a step is computed: compile, autocast; each against plain."""

import shutil
from dataclasses import replace

import pytest
import torch

from tests.models import write_model
from tests.test_parity import make_config, make_steps, share_of

VARIANT = ("padded", 1, "sgd")


def train(engine, configs):
    """Run by every rank: losses, norms and trained weights of each configuration."""
    from importlib import import_module

    from tp2d_lib.mesh import build_mesh

    results = []
    for config in configs:
        mesh = build_mesh(config.dp_size, config.tp_size)
        built = import_module(f"tp2d_lib.{engine}").build_engine(config, mesh)
        batches = share_of(make_steps(*VARIANT[:2]), mesh, config.batch_size_per_gpu)
        trained = [tuple(map(float, built.step(batch))) for batch in batches]
        weights = [p.detach().float() for p in built.model.parameters()]
        weights = [w.to_local() if hasattr(w, "to_local") else w for w in weights]
        results.append((trained, [weight.clone() for weight in weights]))
    return results


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    path = write_model("qwen2-tied", folder)
    return make_config(path, str(folder), 2, 2, VARIANT)


@pytest.mark.skipif(not shutil.which("g++"), reason="torch.compile needs g++ on a CPU")
@pytest.mark.parametrize("engine", ["fsdp", "autotp"])
def test_compiled_equals_plain(engine, plain, pools):
    again = replace(plain, activation_checkpointing=True, compile=True)
    configs = [plain, replace(plain, compile=True), again]
    for answers in pools(4, engine).run(train, engine, configs):
        expected, *others = answers
        for got in others:
            torch.testing.assert_close(got[0], expected[0], rtol=1e-5, atol=0)
            for weight, other in zip(got[1], expected[1], strict=True):
                torch.testing.assert_close(weight, other, rtol=0, atol=1e-5)
