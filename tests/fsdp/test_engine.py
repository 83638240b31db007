"""Checkpoints, loading and export of the FSDP2 engine, on real ranks."""

import subprocess
import sys
import threading
import time
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from transformers import AutoModelForCausalLM

from tests.support.demo import GLOBAL_BATCH, make_config
from tests.support.models import write_model
from tp2d_lib import data
from tp2d_lib.run.metrics import resident_bytes


def train(config, load, position, steps, save):
    """Run by every rank: losses of ``steps`` steps; loads before and saves after."""
    from tp2d_lib.data import build_dataloader
    from tp2d_lib.fsdp import build_engine
    from tp2d_lib.mesh import build_mesh

    mesh = build_mesh(config.dp_size, config.tp_size)
    engine = build_engine(config, mesh)
    loader = build_dataloader(config, mesh)
    if load:
        engine.load(load)
    draw = torch.rand(())  # consumes the random state that was restored
    loader.position = position
    losses = [float(engine.step(batch)[0]) for batch, _ in zip(loader, range(steps))]  # noqa: B905
    weights = {
        name: weight.full_tensor().detach()
        for name, weight in engine.model.named_parameters()
    }
    if save:
        engine.save(save)
    return losses, weights, draw


@pytest.fixture(scope="module")
def storage(tmp_path_factory):
    return tmp_path_factory.mktemp("storage")


@pytest.fixture(scope="module", params=["adamw", "sgd"])
def halfway(request, demo_paths, storage, pools):
    """Six steps on 2x2 without a stop, and a checkpoint after three of them."""
    config = make_config(demo_paths, storage, 2, 2, optimizer=request.param)
    data.prepare(config)
    folder = storage / f"halfway-{request.param}"
    whole = pools(4).run(train, config, None, 0, 6, None)
    half = pools(4).run(train, config, None, 0, 3, str(folder))
    assert half[0][0] == whole[0][0][:3]  # training itself is deterministic
    return request.param, whole, folder


def test_resume_is_bit_equal(halfway, demo_paths, storage, pools):
    optimizer, whole, folder = halfway
    config = make_config(demo_paths, storage, 2, 2, optimizer=optimizer)
    resumed = pools(4).run(train, config, str(folder), 3 * GLOBAL_BATCH, 3, None)
    for rank, (losses, weights, draw) in enumerate(resumed):
        assert losses == whole[rank][0][3:]
        for name, weight in whole[rank][1].items():
            assert torch.equal(weights[name], weight), name
        # The second number of the rank's own stream: the first half drew one.
        generator = torch.Generator().manual_seed(config.seed + rank)
        stream = [float(torch.rand((), generator=generator)) for _ in range(2)]
        assert float(draw) == stream[1]


@pytest.mark.parametrize("tp_size", [1, 4])
def test_resume_on_another_mesh(halfway, demo_paths, storage, pools, tp_size):
    optimizer, whole, folder = halfway
    config = make_config(
        demo_paths, storage, tp_size, 4 // tp_size, optimizer=optimizer
    )
    moved = pools(4).run(train, config, str(folder), 3 * GLOBAL_BATCH, 3, None)
    torch.testing.assert_close(moved[0][0], whole[0][0][3:], rtol=1e-5, atol=0)
    for name, weight in whole[0][1].items():
        torch.testing.assert_close(moved[0][1][name], weight, rtol=0, atol=1e-4)


def test_copies_resume_too(halfway, demo_paths, storage, pools, tmp_path):
    """HSDP: from one copy of the model to two, on with two bit by bit, back to one."""
    optimizer, whole, folder = halfway
    one = make_config(demo_paths, storage, 2, 2, optimizer=optimizer)
    two = replace(one, tp_size=1, dp_size=4, batch_size_per_gpu=1, dp_replicate_size=2)
    saved, position = str(tmp_path / "two"), 5 * GLOBAL_BATCH
    on = pools(4).run(train, two, str(folder), 3 * GLOBAL_BATCH, 3, None)
    pools(4).run(train, two, str(folder), 3 * GLOBAL_BATCH, 2, saved)
    resumed = pools(4).run(train, two, saved, position, 1, None)
    back = pools(4).run(train, one, saved, position, 1, None)
    torch.testing.assert_close(on[0][0], whole[0][0][3:], rtol=1e-5, atol=0)
    torch.testing.assert_close(back[0][0], whole[0][0][5:], rtol=1e-5, atol=0)
    for rank, (losses, weights, _) in enumerate(resumed):
        assert losses == on[rank][0][2:]
        for name, weight in on[rank][1].items():
            assert torch.equal(weights[name], weight), name
            torch.testing.assert_close(back[0][1][name], weight, rtol=0, atol=1e-4)


def test_resume_on_more_ranks(halfway, demo_paths, storage, pools, tmp_path):
    """From 2 ranks to 4: two of them find no random state of their own."""
    optimizer, whole, _ = halfway
    small = make_config(demo_paths, storage, 2, 1, optimizer=optimizer)
    pools(2).run(train, small, None, 0, 3, str(tmp_path / "small"))
    config = make_config(demo_paths, storage, 2, 2, optimizer=optimizer)
    moved = pools(4).run(
        train, config, str(tmp_path / "small"), 3 * GLOBAL_BATCH, 3, None
    )
    torch.testing.assert_close(moved[0][0], whole[0][0][3:], rtol=1e-5, atol=0)


def export(config, folder):
    from tp2d_lib.fsdp import build_engine
    from tp2d_lib.mesh import build_mesh

    mesh = build_mesh(config.dp_size, config.tp_size)
    build_engine(config, mesh).export(folder)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("name", "copies"), [("qwen2-tied", 1), ("llama", 1), ("qwen2-tied", 2)]
)
def test_export_returns_what_was_loaded(
    name, copies, dtype, demo_paths, pools, tmp_path
):
    """Loading into shards and exporting from them changes no weight and no type."""
    source = write_model(name, tmp_path / "source", dtype)
    tokenizer = Path(demo_paths[0])
    for file in ("tokenizer.json", "tokenizer_config.json"):
        (Path(source) / file).write_bytes((tokenizer / file).read_bytes())
    config = make_config(
        (source, demo_paths[1]), tmp_path, 2, 2, dp_replicate_size=copies
    )
    pools(4).run(export, config, str(tmp_path / "export"))
    before = AutoModelForCausalLM.from_pretrained(source)
    after = AutoModelForCausalLM.from_pretrained(tmp_path / "export")
    assert after.dtype == dtype
    for key, tensor in before.state_dict().items():
        assert torch.equal(after.state_dict()[key], tensor), key
    tied = after.lm_head.weight is after.model.embed_tokens.weight
    assert tied == before.config.tie_word_embeddings
    assert not (tmp_path / "export" / "sharded").exists()


anonymous_bytes = partial(resident_bytes, "RssAnon")  # not of a mapped file


def peak_while_building(config):
    """Run by every rank: growth of its memory while it builds and loads."""
    from tp2d_lib.fsdp import build_engine
    from tp2d_lib.mesh import build_mesh

    mesh = build_mesh(config.dp_size, config.tp_size)
    before, peak, stop = anonymous_bytes(), [0], threading.Event()

    def watch():
        while not stop.is_set():
            peak[0] = max(peak[0], anonymous_bytes())
            time.sleep(0.002)

    thread = threading.Thread(target=watch)
    thread.start()
    engine = build_engine(config, mesh)
    stop.set()
    thread.join()
    dist.barrier()
    del engine
    return peak[0] - before


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux")
def test_no_rank_holds_the_whole_model(demo_paths, pools, tmp_path):
    source = write_model(
        "qwen2-tied",
        tmp_path,
        hidden_size=512,
        intermediate_size=2048,
        num_hidden_layers=12,
        vocab_size=8192,
    )
    whole = sum(file.stat().st_size for file in Path(source).glob("*.safetensors"))
    assert whole > 150e6  # large enough to tell from everything else
    config = make_config((source, demo_paths[1]), tmp_path, 2, 2)
    pools(4).run(peak_while_building, make_config(demo_paths, tmp_path, 2, 2))  # warm
    for grown in pools(4).run(peak_while_building, config):
        assert grown < 0.5 * whole  # its own quarter, and one tensor in passing


ALONE = """
import sys

for name in ("ray", "datasets", "pyarrow", "deepspeed", "mlflow"):
    sys.modules[name] = None  # as if it were not installed
import tp2d_lib.fsdp, tp2d_lib.cost.comm, tp2d_lib.cost.memory
"""


@pytest.mark.ranks
def test_the_engine_imports_neither_ray_nor_deepspeed():
    """Under torchrun, on a machine that has PyTorch and transformers only."""
    subprocess.run([sys.executable, "-c", ALONE], check=True)
