"""What the answers to the lessons' exercises say happens, happens."""

import inspect
from dataclasses import replace

import pytest
import torch
from transformers import AutoModelForCausalLM

import tp2d_lib.autotp.engine
import tp2d_lib.autotp.step
import tp2d_lib.fsdp.engine
import tp2d_lib.fsdp.plan
import tp2d_lib.fsdp.step
from tests.support.models import write_model
from tp2d_lib import autotp, data
from tp2d_lib.cost import comm
from tp2d_lib.mesh import build_mesh
from tp2d_lib.presets import build_config

ENGINES = {"fsdp": tp2d_lib.fsdp.engine, "autotp": tp2d_lib.autotp.engine}
STEPS = {"fsdp": tp2d_lib.fsdp.step, "autotp": tp2d_lib.autotp.step}
NOT_CLIPPED = 1e9
TIES = """    if tied:  # parallelize_module turned one parameter into two
        model.get_output_embeddings().weight = model.get_input_embeddings().weight
"""


@pytest.fixture(scope="module")
def lesson(tmp_path_factory):
    """The lessons' configuration, for two ranks, with its rows."""
    folder = str(tmp_path_factory.mktemp("lesson"))
    config = build_config("demo", folder, device="cpu", dtype="float32")
    config = replace(config, batch_size_per_gpu=2, max_grad_norm=NOT_CLIPPED)
    return replace(config, prepared_data=str(data.prepare(config)))


def edited(module, names: tuple[str, ...], old: str, new: str) -> dict:
    """What a module defines, some of it edited as a reader would in the notebook."""
    source = "\n".join(inspect.getsource(getattr(module, name)) for name in names)
    assert source.count(old) == 1
    defined = dict(vars(module))
    source = "from __future__ import annotations\n" + source.replace(old, new)
    exec(source, defined)
    return defined


def steps(engine: str, config, *edit) -> list[tuple[float, float]]:
    """Losses and gradient norms of three steps, run by every rank."""
    step = STEPS[engine]
    train_step = edited(step, *edit)["train_step"] if edit else step.train_step
    mesh = build_mesh(config.dp_size, config.tp_size, "cpu")
    built = ENGINES[engine].build_engine(config, mesh, train_step=train_step)
    loader = iter(data.build_dataloader(config, mesh))
    done = [built.step(next(loader)) for _ in range(3)]
    return [(float(loss), float(norm)) for loss, norm in done]


def refusal_without_ties(config) -> str:
    names = ("apply_tp", "parallelize")
    parallelize = edited(tp2d_lib.fsdp.plan, names, TIES, "")["parallelize"]
    mesh = build_mesh(config.dp_size, config.tp_size, "cpu")
    with pytest.raises(ValueError, match="must hold") as refused:
        ENGINES["fsdp"].build_engine(config, mesh, parallelize)
    return str(refused.value)


def test_a_head_that_is_no_longer_tied_is_refused(lesson, pools):
    said, _ = pools(2).run(
        refusal_without_ties, replace(lesson, tp_size=2, num_workers=2)
    )
    assert said.endswith("must hold lm_head.weight (1 missing)")


def test_without_dp_size_the_norm_is_halved_and_only_sgd_shows_it(lesson, pools):
    edit = (("train_step", "forward_backward"), "(loss * dp_size)", "loss")
    apart = {}
    for optimizer in ("adamw", "sgd"):
        mesh = {"dp_size": 2, "num_workers": 2}
        config = replace(lesson, optimizer=optimizer, learning_rate=1e-3, **mesh)
        right, _ = pools(2).run(steps, "fsdp", config)
        wrong, _ = pools(2).run(steps, "fsdp", config, *edit)
        assert wrong[0] == pytest.approx((right[0][0], right[0][1] / 2), rel=1e-5)
        moved = abs(right[2][0] - right[0][0])
        apart[optimizer] = abs(wrong[2][0] - right[2][0]) / moved
    assert apart["adamw"] < 0.01 < 0.1 < apart["sgd"]
    clipped = replace(config, max_grad_norm=1e-2)  # both norms are above it
    right, _ = pools(2).run(steps, "fsdp", clipped)
    wrong, _ = pools(2).run(steps, "fsdp", clipped, *edit)
    torch.testing.assert_close(wrong[2][0], right[2][0], rtol=1e-5, atol=0)


def test_the_crossing_of_tp_4_is_at_seven_thirds_of_that_of_tp_8():
    def crossing(tp_size):
        sharded = comm.fsdp_bytes(8e9, tp_size, dp_size=8)
        return sharded / comm.tp_bytes(32, 4096, 1, tp_size)

    assert crossing(4) / crossing(8) == pytest.approx(7 / 3)


def mlp_only(config, full) -> tuple[float, list[str]]:
    """The first loss of a fused model, and which of its modules are sharded."""
    mesh = build_mesh(config.dp_size, config.tp_size, "cpu")
    built = ENGINES["autotp"].build_engine(config, mesh)
    local = {n: p.shape for n, p in built.model.named_parameters()}
    sharded = [name for name in full if local[name] != full[name]]
    loss, _ = built.step(next(iter(data.build_dataloader(config, mesh))))
    return float(loss), sharded


def test_with_rules_for_the_mlp_only_four_modules_are_sharded(lesson, pools, tmp_path):
    fused = write_model("phi3", tmp_path, vocab_size=2048, num_hidden_layers=1)
    model = AutoModelForCausalLM.from_pretrained(fused)
    gate_and_up = {"patterns": [".*gate_up_proj.weight$"], "shape": [2, -1]}
    down = {"patterns": [".*down_proj.weight$"], "partition_type": "row"}
    rules = {"use_default_specs": False, "layer_specs": [gate_and_up, down]}
    config = replace(lesson, model_name=fused, tp_size=2, num_workers=2)
    config = autotp.check(replace(config, partition_config=rules))
    full = {name: p.shape for name, p in model.named_parameters()}
    (loss, sharded), _ = pools(2).run(mlp_only, config, full)
    assert [name.split(".")[-2] for name in sharded] == [
        "embed_tokens",
        "gate_up_proj",
        "down_proj",
        "lm_head",
    ]
    alone = replace(config, tp_size=1, num_workers=1, partition_config=None)
    rows = next(iter(data.BatchLoader(alone, data.prepare(alone), dp_rank=0)))[0]
    with torch.no_grad():
        assert model(**rows).loss.item() == pytest.approx(loss, rel=1e-6)


def test_without_the_micro_batches_the_gradient_of_two_is_halved(lesson, pools):
    edit = (("train_step",), " * len(batch)", "")
    for micro_batches, factor in ((1, 1), (2, 2)):
        settings = {"gradient_accumulation_steps": micro_batches, "zero_stage": 1}
        config = replace(lesson, tp_size=2, num_workers=2, **settings)
        right, _ = pools(2).run(steps, "autotp", config)
        wrong, _ = pools(2).run(steps, "autotp", config, *edit)
        expected = (right[0][0], right[0][1] / factor)
        assert wrong[0] == pytest.approx(expected, rel=1e-5)


def test_fused_weights_send_four_sevenths_of_what_others_send():
    fused, separate = (comm.tp_bytes(32, 4096, 1, 2, columns=n) for n in (2, 5))
    assert 1 - fused / separate == pytest.approx(3 / 7)
