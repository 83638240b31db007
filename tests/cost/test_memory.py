"""The predicted peak is the memory that the operating system gives a rank."""

import ctypes
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from tests.support.models import write_model
from tp2d_lib.config import TrainConfig
from tp2d_lib.cost import dryrun
from tp2d_lib.run.metrics import resident_bytes

M_MMAP_THRESHOLD = -3  # of malloc.h
SIZES = {
    "hidden_size": 512,
    "intermediate_size": 2048,
    "num_hidden_layers": 4,
    "vocab_size": 32_768,
    "max_position_embeddings": 512,
}


def peak_of_a_step(engine, tiny, config):
    """Run by every rank: by how much its resident memory grew, at most.

    A step of a tiny model comes first, for which the libraries load code and buffers.
    """
    from tp2d_lib import autotp, fsdp
    from tp2d_lib.mesh import build_mesh

    mesh = build_mesh(config.dp_size, config.tp_size)
    build = {"fsdp": fsdp, "autotp": autotp}[engine].build_engine
    ids = torch.randint(500, (config.batch_size_per_gpu, config.seq_length))
    batch = [{"input_ids": ids, "labels": ids}]
    libc = ctypes.CDLL("libc.so.6")
    libc.mallopt(M_MMAP_THRESHOLD, 65_536)  # what is freed goes back at once
    build(tiny, mesh).step(batch)
    libc.malloc_trim(0)
    before = resident_bytes("RssAnon")
    built = build(config, mesh)
    built.step(batch)
    libc.malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # VmHWM starts again
    built.step(batch)
    # Without pages of files, such as the weights', which the kernel can drop.
    return resident_bytes("VmHWM") - resident_bytes("RssFile") - before


@pytest.mark.parametrize(
    ("engine", "tp_size", "dp_size", "chunk"),
    [("fsdp", 1, 2, 0), ("autotp", 2, 1, 128)],
)
def test_peak(engine, tp_size, dp_size, chunk, pools, tmp_path):
    config = TrainConfig(
        model_name=write_model("qwen2-tied", tmp_path / "large", **SIZES),
        tp_size=tp_size,
        dp_size=dp_size,
        seq_length=512,
        batch_size_per_gpu=2,
        loss_chunk_tokens=chunk,
        zero_stage=0,  # the others' buffers are larger than this model, and not filled
        storage_path=str(tmp_path),
        device="cpu",
    )
    tiny = write_model("qwen2-tied", tmp_path, max_position_embeddings=512)
    tiny = replace(config, model_name=tiny, loss_chunk_tokens=0)
    predicted = dryrun.peak(dryrun.predict(engine, config))
    ranks = pools(2, f"{engine}-memory")
    for measured in ranks.run(peak_of_a_step, engine, tiny, config):
        assert predicted == pytest.approx(measured, rel=0.05)
