"""The DeepSpeed engine: parity at every ZeRO stage, exact resume, export."""

import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from deepspeed.accelerator import get_accelerator
from transformers import AutoModelForCausalLM

from tests.support import damage, reference
from tests.support.autotp import STAGES, make_config, train
from tests.support.models import write_model
from tests.support.parity import (
    assert_weights_equal,
    make_steps,
    share_of,
    train_references,
)
from tp2d_lib import autotp, fsdp
from tp2d_lib.autotp import engine as autotp_engine
from tp2d_lib.autotp import universal
from tp2d_lib.autotp.loading import load_full_model
from tp2d_lib.autotp.zero import deepspeed_config
from tp2d_lib.checkpoint import manifest
from tp2d_lib.config import ConfigError, TrainConfig

VARIANTS = [("padded", 2, "adamw"), ("packed", 1, "sgd")]
NAMES = ("qwen2-tied", "qwen3", "llama")


def train_unchecked(config, rows, folder):
    """Run by every rank: what the engine refuses."""
    check = autotp_engine.check_precision
    autotp_engine.check_precision = lambda *_: None
    try:
        return train(config, rows, folder, resume=False)
    finally:
        autotp_engine.check_precision = check


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    return {name: write_model(name, folder) for name in NAMES}


@pytest.fixture(scope="module")
def references(models):
    return train_references(models, VARIANTS)


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize(
    ("name", "mesh"),
    [
        *((name, (2, 2)) for name in NAMES),
    ],
    ids=str,
)
def test_mesh_equals_one_process(
    name, mesh, stage, models, references, pools, tmp_path
):
    """Losses, norms and exported weights; and a resume that is bit-equal."""
    # DeepSpeed keeps one mesh in a process for good: each has processes of its own.
    ranks = pools(mesh[0] * mesh[1], f"autotp-{mesh}")
    # One model meets both variants, each other model one of them.
    variants = {"qwen3": VARIANTS[:1], "llama": VARIANTS[1:]}.get(name, VARIANTS)
    for variant in variants:
        folder = tmp_path / variant[2]
        config = make_config(models[name], str(tmp_path), *mesh, stage, variant)
        losses, norms, weights = references[(name, *variant)]
        # SGD has no state but the weights: its resume is compared for one model.
        resumes = variant == VARIANTS[0] or (name, mesh) == (NAMES[0], (2, 2))
        for got, exact in ranks.run(train, config, variant[0], str(folder), resumes):
            assert exact == (True if resumes else None)
            torch.testing.assert_close([g[0] for g in got], losses, rtol=1e-5, atol=0)
            torch.testing.assert_close([g[1] for g in got], norms, rtol=1e-4, atol=0)
        exported = AutoModelForCausalLM.from_pretrained(folder / "export")
        assert_weights_equal(dict(exported.named_parameters()), weights)


def train_from_own_seed(config, rows):
    """Run by every rank: its generator once it is built, losses and norms."""
    from tp2d_lib.autotp import build_engine
    from tp2d_lib.mesh import build_mesh

    mesh = build_mesh(config.dp_size, config.tp_size)
    engine = build_engine(config, mesh)
    state = torch.get_rng_state()
    batches = share_of(make_steps(rows, 1), mesh, config.batch_size_per_gpu)
    return state, [tuple(map(float, engine.step(batch))) for batch in batches]


def test_tp_ranks_drop_out_the_same(tmp_path, pools):
    """Each holds the whole residual stream, so it must be the same on all of them."""
    sizes = {"hidden_dropout": 0.2, "initializer_range": 0.2}
    path = write_model("gpt-neox", tmp_path, **sizes)
    rows, _, optimizer = VARIANTS[1]
    config = make_config(path, str(tmp_path), 2, 1, 1, VARIANTS[1])
    ranks = pools(2, "autotp-(2, 1)").run(train_from_own_seed, config, rows)
    steps = make_steps(rows, 1)
    for state, got in ranks:
        losses, norms, _ = reference.train(
            path, optimizer, steps, config.max_grad_norm, rng_state=state
        )
        torch.testing.assert_close([g[0] for g in got], losses, rtol=1e-5, atol=0)
        torch.testing.assert_close([g[1] for g in got], norms, rtol=1e-4, atol=0)
    without = reference.train(path, optimizer, steps, config.max_grad_norm)
    assert abs(without[0][0] - losses[0]) > 1e-4  # another mask, another loss
    config = replace(config, tp_size=1, dp_size=2, batch_size_per_gpu=2)
    (one, _), (other, _) = pools(2, "autotp-(1, 2)").run(
        train_from_own_seed, config, rows
    )
    assert not torch.equal(one, other)


def test_stage_0_in_half_precision_is_refused(models, tmp_path):
    config = make_config(models["llama"], str(tmp_path), 2, 2, 0, VARIANTS[0])
    autotp.check(config)
    for dtype in ("bfloat16", "float16"):
        half = replace(config, dtype=dtype, device="cuda")
        for sizes in ({}, {"tp_size": 1, "num_workers": 2}):
            with pytest.raises(
                ConfigError, match=r"decays weights too .* zero_stage=1"
            ):
                autotp.check(replace(half, **sizes))
            autotp.check(replace(half, zero_stage=1, **sizes))


def test_precisions_that_cannot_be_are_refused(models, tmp_path):
    config = make_config(models["llama"], str(tmp_path), 2, 2, 1, VARIANTS[0])
    if not get_accelerator().is_fp16_supported():
        with pytest.raises(ConfigError, match="dtype='float16' must run on a GPU"):
            autotp.check(replace(config, dtype="float16"))
    with pytest.raises(ConfigError, match="works with DeepSpeed only"):
        fsdp.check(replace(config, dtype="float16"))


def train_in(config, rows, scale_power=16):
    """Run by every rank, float16 also where the CPU only emulates it.

    Losses and norms; the loss scale and skipped steps.
    """
    from tp2d_lib.mesh import build_mesh

    accelerator = type(get_accelerator())
    supported, accelerator.is_fp16_supported = (
        accelerator.is_fp16_supported,
        lambda _: True,
    )

    def with_scale(config):
        settings = deepspeed_config(config)
        settings["fp16"]["initial_scale_power"] = scale_power
        return settings

    try:
        mesh = build_mesh(config.dp_size, config.tp_size)
        engine = autotp.build_engine(config, mesh, with_scale)
        steps = make_steps(rows, config.gradient_accumulation_steps)
        batches = share_of(steps, mesh, config.batch_size_per_gpu)
        got = [tuple(map(float, engine.step(batch))) for batch in batches]
    finally:
        accelerator.is_fp16_supported = supported
    scale = getattr(engine.optimizer, "loss_scale", None)
    return got, scale, engine.wrapped.skipped_steps


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_half_precisions_follow_float32(stage, models, references, pools, tmp_path):
    variant = VARIANTS[0]
    losses, norms, _ = references[("llama", *variant)]
    config = make_config(models["llama"], str(tmp_path), 2, 2, stage, variant)
    ranks = pools(4, "autotp-(2, 2)")
    for name, settings in {
        "fp16": {"dtype": "float16"},
        "bf16": {"dtype": "bfloat16"},
    }.items():
        answers = ranks.run(train_in, replace(config, **settings), variant[0])
        for got, scale, skipped in answers:
            assert skipped == 0
            assert scale == 2**16 if name == "fp16" else scale in (1, None)
            torch.testing.assert_close([g[0] for g in got], losses, rtol=1e-3, atol=0)
            torch.testing.assert_close([g[1] for g in got], norms, rtol=1e-2, atol=0)


def test_half_precisions_are_loaded_as_such(tmp_path):
    """Half of the host's memory; rotary frequencies stay exact."""
    config = make_config(
        write_model("gemma2", tmp_path), str(tmp_path), 2, 2, 1, VARIANTS[0]
    )
    full = load_full_model(config)
    half = load_full_model(replace(config, dtype="bfloat16"))
    named = dict(half.named_parameters())
    for name, parameter in full.named_parameters():
        assert parameter.dtype == torch.float32
        assert torch.equal(named[name], parameter.bfloat16()), name
    named = dict(half.named_buffers())
    for name, buffer in full.named_buffers():
        assert torch.equal(named[name], buffer), name


def test_float16_overflows_and_recovers(models, references, pools, tmp_path):
    """A loss scale that is too high skips steps, is halved, and training goes on."""
    variant = VARIANTS[0]
    config = make_config(models["llama"], str(tmp_path), 2, 2, 1, variant)
    config = replace(config, dtype="float16")
    answers = pools(4, "autotp-(2, 2)").run(train_in, config, variant[0], 20)
    for got, scale, skipped in answers:
        assert 0 < skipped < len(got)
        assert scale < 2**20
        assert [norm == float("inf") for _, norm in got].count(True) == skipped
        assert got[-1][1] < 10


@pytest.mark.parametrize("stage", [0, 1])
def test_stage_0_with_bfloat16_is_still_wrong(
    stage, models, references, pools, tmp_path
):
    """Upstream's error, so that a release without it is noticed; stage 1 is right."""
    variant = VARIANTS[0]
    config = make_config(models["llama"], str(tmp_path), 2, 2, stage, variant)
    config = replace(config, dtype="bfloat16")
    ranks = pools(4, "autotp-(2, 2)")
    answers = ranks.run(train_unchecked, config, variant[0], str(tmp_path))
    expected = references[("llama", *variant)][1][0]
    wrong = abs(answers[0][0][0][1] - expected) / expected > 0.1
    assert wrong == (stage == 0)


def first_half(config, folder):
    """Run by every rank: two steps, then a checkpoint."""
    from tp2d_lib.mesh import build_mesh

    mesh = build_mesh(config.dp_size, config.tp_size)
    engine = autotp.build_engine(config, mesh)
    batches = share_of(make_steps("padded", 2), mesh, config.batch_size_per_gpu)
    losses = [float(engine.step(batch)[0]) for batch in batches[:2]]
    engine.save(folder)
    return losses


def second_half(config, folder):
    """Run by every rank: the steps after it, and the exported weights."""
    from tp2d_lib.mesh import build_mesh

    mesh = build_mesh(config.dp_size, config.tp_size)
    engine = autotp.build_engine(config, mesh)
    engine.load(folder)
    batches = share_of(make_steps("padded", 2), mesh, config.batch_size_per_gpu)
    losses = [float(engine.step(batch)[0]) for batch in batches[2:]]
    engine.export(f"{folder}-export")
    return losses


def refused(config, folder):
    """Run by every rank: what the second half says instead."""
    with pytest.raises(ConfigError) as error:
        second_half(config, folder)
    return str(error.value)


MOVES = [
    ((2, 2), (1, 4), 1, 1),
    ((2, 2), (1, 4), 2, 2),
    ((2, 2), (1, 4), 3, 3),
    ((1, 4), (2, 2), 1, 2),
    ((1, 4), (2, 2), 3, 3),
]


@pytest.mark.parametrize(
    ("name", "before", "after", "stage", "then"),
    [
        *(("qwen2-tied", *MOVES[i]) for i in (0, 2)),
        ("llama", *MOVES[3]),  # an untied head
        *(pytest.param("llama", *MOVES[i], marks=pytest.mark.faults) for i in (1, 4)),
    ],
)
def test_another_mesh_goes_on_with_the_same_run(
    name, before, after, stage, then, models, references, pools, tmp_path
):
    variant = VARIANTS[0]
    losses, _, weights = references[(name, *variant)]
    config = make_config(models[name], str(tmp_path), *before, stage, variant)
    folder = str(tmp_path / "checkpoint")
    got = pools(4, f"autotp-{before}").run(first_half, config, folder)[0]
    config = make_config(models[name], str(tmp_path), *after, then, variant)
    got += pools(4, f"autotp-{after}").run(second_half, config, folder)[0]
    torch.testing.assert_close(got, losses, rtol=1e-5, atol=0)
    exported = AutoModelForCausalLM.from_pretrained(f"{folder}-export")
    assert_weights_equal(dict(exported.named_parameters()), weights)


def test_the_plan_may_change_with_the_checkpoint(models, references, pools, tmp_path):
    variant = VARIANTS[0]
    config = make_config(models["llama"], str(tmp_path), 2, 2, 1, variant)
    ranks, folder = pools(4, "autotp-(2, 2)"), str(tmp_path / "checkpoint")
    whole_head = replace(config, vocab_parallel_lm_head=False)
    got = ranks.run(first_half, whole_head, folder)[0]
    got += ranks.run(second_half, config, folder)[0]
    expected = references[("llama", *variant)][0]
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=0)


def test_the_driver_converts_once_before_the_workers(
    models, references, pools, tmp_path, capsys, monkeypatch
):
    """The newest checkpoint is damaged, so the one before it; and only if needed."""
    variant, run = VARIANTS[0], tmp_path / "run"
    config = make_config(models["llama"], str(tmp_path), 2, 2, 1, variant)
    config = replace(config, run_name="run")
    ranks = pools(4, "autotp-(2, 2)")
    for step in (2, 4):
        partial = manifest.partial_folder(config, step)
        losses = ranks.run(first_half, config, str(partial))[0]
        manifest.publish(partial, {}, {"engine": "autotp"})
    damage.flip(next((run / "checkpoint-000004").rglob("*optim_states.pt")))
    autotp.prepare_start(config)
    assert not list(run.glob("converted-*"))  # the same layout

    moved = make_config(models["llama"], str(tmp_path), 1, 4, 1, variant)
    moved = replace(moved, run_name="run")
    later = "import multiprocessing as m; m.set_start_method('forkserver')\n"
    monkeypatch.setattr(universal, "CONVERT", later + universal.CONVERT)  # 3.14's way
    autotp.prepare_start(moved)
    said = capsys.readouterr().out
    assert said == "converting checkpoint-000002 for the new mesh, once\n"
    used = next(run.glob("converted-*"))
    folder = str(run / "checkpoint-000002")
    losses += pools(4, "autotp-(1, 4)").run(second_half_prepared, moved, folder)[0]
    expected = references[("llama", *variant)][0]
    torch.testing.assert_close(losses, expected, rtol=1e-5, atol=0)

    autotp.prepare_start(config)  # back again: the copy goes
    assert not used.exists()
    (used / "universal").mkdir(parents=True)
    manifest.prune(config, step=4)  # and it goes with the first checkpoint written
    assert not used.exists()


def second_half_prepared(config, folder):
    """Run by every rank: the second half, without a converter to fall back on."""
    from tp2d_lib.autotp import universal

    convert, universal.convert = universal.convert, None
    try:
        return second_half(config, folder)
    finally:
        universal.convert = convert


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"zero_stage": 3}, "zero_stage=3 cannot load .* try zero_stage=1 on the same"),
        ({"zero_stage": 0}, "zero_stage=0 cannot load .* try zero_stage=1 on the same"),
        ({"optimizer": "sgd", "zero_stage": 2}, "optimizer='sgd' must be 'adamw'"),
    ],
)
def test_what_universal_checkpoint_cannot_do_is_said(
    settings, sentence, models, pools, tmp_path
):
    config = make_config(models["llama"], str(tmp_path), 2, 2, 1, VARIANTS[0])
    ranks, folder = pools(4, "autotp-(2, 2)"), str(tmp_path / "checkpoint")
    ranks.run(first_half, config, folder)
    config = replace(config, **settings)
    for said in ranks.run(refused, config, folder):
        assert re.search(sentence, said)
    written = tmp_path / "checkpoint.partial"  # as a run writes it
    Path(folder).rename(written)
    manifest.publish(written, {}, {"engine": "autotp"})
    with pytest.raises(ConfigError, match=sentence):  # and before that, in the driver
        autotp.check(replace(config, resume_from_checkpoint=folder))
    with pytest.raises(ConfigError, match=r"^resume_from_checkpoint=.* must resume"):
        fsdp.check(replace(config, resume_from_checkpoint=folder))


def test_the_engine_imports_no_compiler():
    """DeepSpeed would, for an optimizer that it looks for in every process."""
    code = (
        "import sys, tp2d_lib.autotp;"
        "assert 'deepspeed.runtime.zero.muon.original_muon' in sys.modules;"
        "assert 'torch._inductor.compile_fx' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_layout_fits_where_nothing_that_is_decided_differs():
    config = TrainConfig(tp_size=2, dp_size=2)
    written = universal.layout(replace(config, vocab_parallel_lm_head=True))
    written["tp_preset"] = None  # of a release that had this setting
    assert universal.fits(written, config)
    for other in ({"vocab_parallel_lm_head": False}, {"zero_stage": 3}, {"tp_size": 4}):
        moved = replace(config, num_workers=None, **other)
        assert not universal.fits(written, moved), other
