"""A plan that does not cover a model is an error that names what is left."""

import pytest
import torch
from torch import nn
from transformers import (
    ApertusConfig,
    AutoModelForCausalLM,
    MixtralConfig,
    Phi3Config,
    Qwen3Config,
    StableLmConfig,
)

from tp2d_lib.plan import PlanError, check_whole_gradients, tensor_parallel_plan

SIZES = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}


def empty(kind, **settings):
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(kind(**SIZES, **settings))


def test_plan_names_every_kind_of_module_once():
    plan = tensor_parallel_plan(empty(Qwen3Config, num_key_value_heads=2, head_dim=8))
    styles = {name: type(style).__name__ for name, style in plan.items()}
    assert styles == {
        "model.embed_tokens": "RowwiseParallel",
        "model.layers.*.self_attn": "PrepareModuleInput",
        "model.layers.*.self_attn.q_proj": "ColwiseParallel",
        "model.layers.*.self_attn.k_proj": "ColwiseParallel",
        "model.layers.*.self_attn.v_proj": "ColwiseParallel",
        "model.layers.*.self_attn.o_proj": "RowwiseParallel",
        "model.layers.*.self_attn.q_norm": "SequenceParallel",
        "model.layers.*.self_attn.k_norm": "SequenceParallel",
        "model.layers.*.mlp": "PrepareModuleInput",
        "model.layers.*.mlp.gate_proj": "ColwiseParallel",
        "model.layers.*.mlp.up_proj": "ColwiseParallel",
        "model.layers.*.mlp.down_proj": "RowwiseParallel",
        "model.layers.*.input_layernorm": "SequenceParallel",
        "model.layers.*.post_attention_layernorm": "SequenceParallel",
        "model.norm": "SequenceParallel",
        "lm_head": "ColwiseParallel",
    }


@pytest.mark.parametrize(
    ("kind", "settings", "named"),
    [
        (Phi3Config, {"pad_token_id": 0}, "rowwise_split_input"),
        (MixtralConfig, {"num_key_value_heads": 2}, "experts"),
    ],
)
def test_style_that_is_not_known(kind, settings, named):
    with pytest.raises(PlanError, match=rf"style .*{named}.* must be one of"):
        tensor_parallel_plan(empty(kind, **settings))


def test_model_without_a_plan_for_its_layers():
    with pytest.raises(PlanError, match="StableLmForCausalLM must publish a tp_plan"):
        tensor_parallel_plan(empty(StableLmConfig, num_key_value_heads=4))


def test_model_with_a_plan_for_a_part():
    with pytest.raises(
        PlanError, match=r"leaves 'model\.layers\.0\.mlp\.act_fn\.alpha_p'"
    ):
        tensor_parallel_plan(empty(ApertusConfig, num_key_value_heads=4))


def apply_to_uncovered(model_dir):
    """Run by every rank: a module that the plan does not know."""
    from tp2d_lib.fsdp import apply_tp
    from tp2d_lib.mesh import build_mesh

    mesh = build_mesh(1, 2)
    model = AutoModelForCausalLM.from_pretrained(model_dir)
    plan = tensor_parallel_plan(model)
    model.model.layers[1].mlp.gain = nn.Parameter(torch.ones(4))
    messages = []
    for attempt in (
        lambda: tensor_parallel_plan(model),
        lambda: apply_tp(model, mesh["tp"], plan),  # a plan edited by its reader
    ):
        try:
            attempt()
        except PlanError as error:
            messages.append(str(error))
    return messages


def test_parameter_off_the_mesh_is_named(demo_paths, pools):
    for first, second in pools(2).run(apply_to_uncovered, demo_paths[0]):
        assert "leaves 'model.layers.1.mlp.gain' whole" in first
        assert "leaves 'model.layers.1.mlp.gain' off the tp mesh" in second


def load_untied(config):
    """Run by every rank: a plan whose reader forgot to tie the weights again."""
    from torch.distributed.tensor.parallel import parallelize_module

    from tp2d_lib.fsdp import apply_fsdp, build_engine
    from tp2d_lib.mesh import build_mesh

    def parallelize(model, mesh, dtype):
        parallelize_module(model, mesh["tp"], tensor_parallel_plan(model))
        apply_fsdp(model, mesh["dp"], dtype)
        return model

    try:
        build_engine(config, build_mesh(config.dp_size, config.tp_size), parallelize)
    except ValueError as error:
        return str(error)


def test_weight_that_no_file_fills_is_named(demo_paths, pools, tmp_path):
    from tests.test_engine import make_config

    config = make_config(demo_paths, tmp_path, 2, 2)
    for message in pools(4).run(load_untied, config):
        assert "must hold lm_head.weight (1 missing)" in message


def tampered_step(config, factor):
    """Run by every rank: a norm whose gradient one tp rank sees differently."""
    from tp2d_lib.data import build_dataloader
    from tp2d_lib.fsdp import build_engine, forward_backward
    from tp2d_lib.mesh import build_mesh

    mesh = build_mesh(config.dp_size, config.tp_size)
    engine = build_engine(config, mesh)
    (micro,) = next(iter(build_dataloader(config, mesh)))
    forward_backward(engine, micro, torch.tensor(100))
    name = "model.layers.1.input_layernorm.weight"
    gradient = dict(engine.model.named_parameters())[name].grad
    gradient.to_local().mul_(1 + factor * mesh["tp"].get_local_rank())
    try:
        engine.check_first_gradients()
    except PlanError as error:
        return str(error)


def test_partial_gradient_stops_the_run(demo_paths, pools, tmp_path):
    from tests.test_engine import make_config

    config = make_config(demo_paths, tmp_path, 2, 2)
    assert pools(4).run(tampered_step, config, 0.0) == [None] * 4
    for message in pools(4).run(tampered_step, config, 0.01):
        assert "gradient of 'model.layers.1.input_layernorm.weight'" in message


def test_gradients_without_whole_parameters():
    check_whole_gradients({}, group=None)  # tp_size 1: nothing to compare


def compare_gradients(values):
    """Run by every rank: what the check says of one gradient."""
    import torch.distributed as dist

    return check_whole_gradients({"w": torch.tensor(values)}, dist.group.WORLD)


def test_overflowed_gradients_are_compared_later(pools):
    """float16 starts with infinities: they tell nothing, and the check must wait."""
    assert pools(2).run(compare_gradients, [1.0, float("inf")]) == [False] * 2
    assert pools(2).run(compare_gradients, [1.0, 2.0]) == [True] * 2
