"""Options that change how a step is computed: compile, autocast; each against plain."""

import os
import shutil
import traceback
from contextlib import nullcontext
from dataclasses import replace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from tests.support.models import write_model
from tests.support.parity import make_config, make_steps, share_of, the_mesh
from tp2d_lib import autotp, fsdp
from tp2d_lib.config import ConfigError
from tp2d_lib.cost.comm import is_wrapper
from tp2d_lib.model import determinism

VARIANT = ("padded", 1, "sgd")


def train(engine, configs):
    """Run by every rank: losses, norms and trained weights of each configuration."""
    from importlib import import_module

    from torch._dynamo.utils import counters

    from tp2d_lib.cost.comm import CommBytes
    from tp2d_lib.fsdp import plan

    results = []
    mesh = the_mesh(configs[0].dp_size, configs[0].tp_size)
    plan.SMALLEST_GROUP = 1  # each layer by itself, as in a model of a usual size
    for config in configs:
        built = import_module(f"tp2d_lib.{engine}").build_engine(config, mesh)
        steps = make_steps(VARIANT[0], config.gradient_accumulation_steps)
        batches = share_of(steps, mesh, config.batch_size_per_gpu)
        counted = CommBytes(mesh)  # a compiled function would be compiled with it
        with nullcontext() if config.compile else counted:
            trained = [tuple(map(float, built.step(batch))) for batch in batches]
        weights = [p.detach().float() for p in built.model.parameters()]
        weights = [w.to_local() if hasattr(w, "to_local") else w for w in weights]
        assert bool(counters["stats"]["unique_graphs"]) == config.compile
        kept = [weight.clone() for weight in weights]
        results.append((trained, kept, counted.sent("dp")))
    return results


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    path = write_model("qwen2-tied", folder)
    return make_config(path, str(folder), 2, 2, VARIANT)


def test_autocast_computes_in_bfloat16_and_sends_float32(plain, pools):
    half = replace(plain, dtype="bfloat16")
    autocast = replace(plain, autocast=True, loss_chunk_tokens=24)
    for answers in pools(4, "fsdp").run(train, "fsdp", [plain, autocast, half]):
        (exact, _, sent), (got, weights, sent_too), (rounded, _, sent_half) = answers
        torch.testing.assert_close(got, exact, rtol=2e-2, atol=0)
        assert got != exact
        assert got != rounded
        assert all(weight.dtype == torch.float32 for weight in weights)
        assert sent_too == sent > sent_half


def test_fewer_bytes_for_the_same_steps(plain, pools):
    """Of two micro-batches: weights gathered four times, then twice."""
    usual = replace(plain, gradient_accumulation_steps=2)
    kept = replace(usual, reshard_after_forward=False)
    for answers in pools(4, "fsdp").run(train, "fsdp", [usual, kept]):
        (steps, weights, sent), (_, _, sent_kept) = answers
        torch.testing.assert_close(answers[1][0], steps, rtol=1e-5, atol=0)
        torch.testing.assert_close(answers[1][1], weights, rtol=0, atol=1e-5)
        assert sent_kept < 0.8 * sent  # the head's are gathered once anyway


class Reads(TorchDispatchMode):
    """Files that read a tensor's numbers, for which a host waits for its GPU."""

    def __init__(self):
        super().__init__()
        self.files = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if any(map(is_wrapper, types)):
            return NotImplemented
        name = func.overloadpacket.__name__
        if name in ("_local_scalar_dense", "nonzero", "equal", "masked_select"):
            frames = [frame.filename for frame in traceback.extract_stack()[:-1]]
            self.files.append([name for name in frames if "/torch/" not in name][-1])
        return func(*args, **(kwargs or {}))


def count_reads(engine, config):
    """Run by every rank: the files that read numbers in a later step."""
    from importlib import import_module

    mesh = the_mesh(config.dp_size, config.tp_size)
    built = import_module(f"tp2d_lib.{engine}").build_engine(config, mesh)
    first, *later = share_of(make_steps(*VARIANT[:2]), mesh, config.batch_size_per_gpu)
    built.step(first)  # compares gradients
    with Reads() as reads:
        for batch in later:
            built.step(batch)
    return reads.files


@pytest.mark.parametrize("engine", ["fsdp", "autotp"])
def test_no_step_waits_for_the_device(engine, plain, pools):
    """DeepSpeed reads whether a target is outside the vocabulary, and its norm."""
    plain = replace(plain, dp_size=1, num_workers=2, batch_size_per_gpu=4)
    for files in pools(2, engine).run(count_reads, engine, plain):
        ours = [file for file in files if "/deepspeed/" not in file]
        assert not ours
        assert bool(files) == (engine == "autotp")


@pytest.mark.skipif(not shutil.which("g++"), reason="torch.compile needs g++ on a CPU")
@pytest.mark.parametrize(
    ("engine", "tp_size"),
    [("fsdp", 2), pytest.param("autotp", 1, marks=pytest.mark.faults)],
)
def test_compiled_equals_plain(engine, tp_size, plain, pools):
    """Without tp a layer is compiled as one, with tp its attention and its MLP are.

    The net of pairs compiles both ways with both engines.
    """
    sizes = {"tp_size": tp_size, "dp_size": 2 // tp_size}
    plain = replace(plain, **sizes, num_workers=2, batch_size_per_gpu=2 * tp_size)
    compiled = [
        replace(
            plain, compile=True, activation_checkpointing=kind, loss_chunk_tokens=24
        )
        for kind in ("selective", "full")
    ]
    ranks = pools(2, f"{engine}-compiled-{tp_size}")
    for expected, *others in ranks.run(train, engine, [plain, *compiled]):
        for got in others:
            torch.testing.assert_close(got[0], expected[0], rtol=1e-5, atol=0)
            for weight, other in zip(got[1], expected[1], strict=True):
                torch.testing.assert_close(weight, other, rtol=0, atol=1e-5)


def train_deterministically(engine, config):
    """Run by every rank: its losses and norms, and the settings it computed them with.

    PyTorch fills the memory of new tensors with NaN then: so nothing reads it.
    """
    (trained, _, _), *_ = train(engine, [config])
    settings = {name: os.environ.get(name) for name in determinism.DEFAULTS}
    settings["strict"] = torch.get_deterministic_debug_mode() == 2
    settings["fixed"] = torch.backends.cudnn.deterministic
    return trained, settings


@pytest.mark.parametrize("engine", ["fsdp", "autotp"])
def test_deterministic_trains_the_same(engine, plain, pools):
    plain = replace(plain, dp_size=1, num_workers=2, batch_size_per_gpu=4)
    ranks = pools(2, f"{engine}-deterministic")  # a process stays so
    usual = ranks.run(train_deterministically, engine, plain)
    strict = ranks.run(
        train_deterministically, engine, replace(plain, deterministic=True)
    )
    off = dict.fromkeys(determinism.DEFAULTS) | {"strict": False, "fixed": False}
    on = determinism.DEFAULTS | {"strict": True, "fixed": True}
    for (expected, before), (got, after) in zip(usual, strict, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-6, atol=0)
        assert (before, after) == (off, on)


@pytest.mark.parametrize(
    ("engine", "settings", "sentence"),
    [
        (
            fsdp,
            {"autocast": True, "dtype": "float32"},
            "autocast=True must be combined with bf",
        ),
        (autotp, {"autocast": True}, "autocast=True works with FSDP2 only"),
        (
            autotp,
            {"loss_chunk_tokens": 8, "zero_stage": 3},
            "loss_chunk_tokens=8 cannot be combined with zero_stage=3",
        ),
        (autotp, {"dp_replicate_size": 2}, "dp_replicate_size=2 works with FSDP2 only"),
        (autotp, {"async_checkpoint": True}, "async_checkpoint=True works with FSDP2"),
    ],
)
def test_an_engine_refuses_what_it_cannot(engine, settings, sentence, plain):
    with pytest.raises(ConfigError, match=sentence):
        engine.check(replace(plain, **settings))


def test_compile_needs_a_compiler(plain, monkeypatch):
    monkeypatch.setattr(shutil, "which", lambda name: None)
    with pytest.raises(ConfigError, match=r"compile=True must find a C\+\+ compiler"):
        fsdp.check(replace(plain, compile=True))
