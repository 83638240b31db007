"""A plan that does not cover a model is an error that names what is left."""

import copy
from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, Shard
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    PrepareModuleOutput,
    RowwiseParallel,
    SequenceParallel,
    parallelize_module,
)
from transformers import (
    ApertusConfig,
    AutoModelForCausalLM,
    GPT2Config,
    MixtralConfig,
    Qwen3Config,
    StableLmConfig,
)

from tests.decoders import tiny
from tests.support import parity, reference
from tests.support.demo import make_config
from tests.support.models import write_model
from tests.support.parity import make_steps, share_of
from tp2d_lib import fsdp
from tp2d_lib.config import ConfigError
from tp2d_lib.fsdp.local import equivalent, on_local_shards
from tp2d_lib.fsdp.plan import STYLES, layer_groups, tensor_parallel_plan
from tp2d_lib.fsdp.whole import ComputeWhole, describe
from tp2d_lib.model import PlanError
from tp2d_lib.model.blocks import shardable

SIZES = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}


def empty(kind, **settings):
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(kind(**SIZES | settings))


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


def test_norm_beside_the_head_has_own_positions():
    """The head's output is gathered in the published plan, but it is no block's."""
    model = empty(Qwen3Config, num_key_value_heads=2, head_dim=8)
    model.norm = copy.deepcopy(model.model.norm)
    assert "gather" in model.tp_plan["lm_head"]
    assert isinstance(tensor_parallel_plan(model)["norm"], SequenceParallel)


def whole_in(plan: dict) -> list[str]:
    return [name for name, style in plan.items() if isinstance(style, ComputeWhole)]


@pytest.mark.parametrize(
    ("kind", "sharded", "left"),
    [
        (MixtralConfig, "self_attn.q_proj", "mlp"),  # experts
        (ApertusConfig, "self_attn.q_proj", "mlp.up_proj"),  # a learned activation
        (StableLmConfig, "mlp.up_proj", "self_attn.q_proj"),  # by names only
    ],
)
def test_what_has_no_style_is_left_whole(kind, sharded, left):
    model = empty(kind, num_key_value_heads=4)
    plan = tensor_parallel_plan(model, Replicate())
    assert f"model.layers.*.{sharded}" in plan
    assert f"model.layers.*.{left}" not in plan
    assert whole_in(plan) == ["model.layers.0", "model.layers.1", "model"]
    said = describe(model, shardable(model, STYLES))
    assert f"; each tp rank computes model.layers.*.{left}" in said


def test_layers_of_one_name_may_differ():
    """Of two MLPs with the same pattern, one holds a parameter that has no style."""
    model = empty(Qwen3Config, num_key_value_heads=2, head_dim=8)
    model.model.layers[1].mlp.gain = nn.Parameter(torch.ones(4))
    plan = tensor_parallel_plan(model, Replicate())
    assert isinstance(plan["model.layers.0.mlp.up_proj"], ColwiseParallel)
    assert not {"model.layers.1.mlp.up_proj", "model.layers.*.mlp.up_proj"} & set(plan)


def test_model_of_which_no_layer_can_be_sharded():
    with pytest.raises(PlanError, match="GPT2LMHeadModel must have layers that can be"):
        tensor_parallel_plan(AutoModelForCausalLM.from_config(GPT2Config(n_layer=1)))


def apply_to_uncovered(model_dir):
    """Run by every rank: a module that the plan, perhaps edited, does not know."""
    from tp2d_lib.fsdp.plan import apply_tp
    from tp2d_lib.mesh import build_mesh

    mesh = build_mesh(1, 2)
    model = AutoModelForCausalLM.from_pretrained(model_dir)
    plan = tensor_parallel_plan(model)
    model.model.layers[1].mlp.gain = nn.Parameter(torch.ones(4))
    try:
        apply_tp(model, mesh["tp"], plan)
    except PlanError as error:
        return str(error)


def test_parameter_off_the_mesh_is_named(demo_paths, pools):
    for said in pools(2).run(apply_to_uncovered, demo_paths[0]):
        assert "leaves 'model.layers.1.mlp.gain' off the tp mesh" in said


def test_layers_compute_on_plain_tensors_or_the_plan_stays():
    plan = tensor_parallel_plan(empty(Qwen3Config, num_key_value_heads=2, head_dim=8))
    local = on_local_shards(plan)
    kept = [name for name, style in plan.items() if local[name] is style]
    assert kept == ["lm_head"]
    output = PrepareModuleOutput(
        output_layouts=Shard(1), desired_output_layouts=Replicate()
    )
    edited = {**plan, "model.layers.*.mlp": output}  # may expect a DTensor
    assert on_local_shards(edited) is edited


def train_by(config, steps, edit):
    """Run by every rank: losses and norms by the plan as PyTorch applies it, or not."""
    from tp2d_lib.fsdp import build_engine, plan
    from tp2d_lib.mesh import build_mesh

    def parallelize(model, mesh, dtype, stream):
        parallelize_module(model, mesh["tp"], edit(tensor_parallel_plan(model, stream)))
        plan.apply_fsdp(model, mesh["dp"], dtype)
        return model

    mesh = build_mesh(config.dp_size, config.tp_size)
    engine = build_engine(config, mesh, parallelize)
    batches = share_of(steps, mesh, config.batch_size_per_gpu)
    return [tuple(map(float, engine.step(batch))) for batch in batches]


@pytest.mark.parametrize(
    ("name", "sequence_parallel"),
    [
        ("qwen3", "auto"),  # untied, with norms on its heads
        ("olmo2", "never"),  # attention on all heads, norms on all of their features
    ],
)
def test_local_shards_train_as_dtensors_do(name, sequence_parallel, tmp_path, pools):
    variant, split = ("padded", 2, "sgd"), {"sequence_parallel": sequence_parallel}
    path = write_model(name, tmp_path)
    config = parity.make_config(path, str(tmp_path), 2, 2, variant, **split)
    ranks, steps = pools(4), make_steps(*variant[:2])
    expected = ranks.run(train_by, config, steps, as_written)
    got = ranks.run(train_by, config, steps, on_local_shards)
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=0)


def as_written(plan):
    return plan


@pytest.mark.parametrize(
    ("layers", "expected"), [(1, [1] * 5), (2, [2, 2]), (4, [4]), (9, [])]
)
def test_neighboring_layers_make_a_group(layers, expected, monkeypatch):
    """What is left at the end stays with the head."""
    model = empty(Qwen3Config, num_key_value_heads=2, head_dim=8, num_hidden_layers=5)
    one = sum(p.numel() for p in model.model.layers[0].parameters())
    monkeypatch.setattr(fsdp.plan, "SMALLEST_GROUP", 2 * one * layers)
    groups = list(layer_groups(model, torch.bfloat16))
    assert [len(group) for group in groups] == expected
    together = [layer for group in groups for layer in group]
    assert together == list(model.model.layers[: len(together)])


def train_in_groups(config, steps, smallest):
    """Run by every rank: losses, norms, and a validation loss before the last step."""
    from tp2d_lib.fsdp import build_engine, plan
    from tp2d_lib.mesh import build_mesh

    mesh, usual = build_mesh(config.dp_size, config.tp_size), plan.SMALLEST_GROUP
    plan.SMALLEST_GROUP = smallest
    engine = build_engine(config, mesh)
    plan.SMALLEST_GROUP = usual
    *batches, last = share_of(steps, mesh, config.batch_size_per_gpu)
    figures = [tuple(map(float, engine.step(batch))) for batch in batches]
    held_out = float(engine.summed_loss(last[0]))
    return [*figures, tuple(map(float, engine.step(last)))], held_out


@pytest.mark.parametrize(
    ("variant", "settings"),
    [
        (("packed", 2, "sgd"), {}),  # recomputed, but for what is costly
        (("padded", 1, "adamw"), {"reshard_after_forward": False}),
    ],
)
def test_layers_gathered_at_once_train_as_each_by_itself(
    variant, settings, tmp_path, pools
):
    path = write_model("qwen3", tmp_path, num_hidden_layers=5)
    config = parity.make_config(path, str(tmp_path), 2, 2, variant)
    config, steps = replace(config, **settings), make_steps(*variant[:2])
    each = pools(4).run(train_in_groups, config, steps, 1)
    # A rank of tp holds 62 kB of a layer: 2 + 2 layers, and one with the head.
    pairs = pools(4).run(train_in_groups, config, steps, 100_000)
    torch.testing.assert_close(pairs, each, rtol=1e-6, atol=0)


def count_calls(config, steps, smallest):
    """Run by every rank: how often an MLP is called in the first step."""
    from tp2d_lib.fsdp import build_engine, plan
    from tp2d_lib.mesh import build_mesh

    mesh, usual = build_mesh(config.dp_size, config.tp_size), plan.SMALLEST_GROUP
    plan.SMALLEST_GROUP = smallest
    engine = build_engine(config, mesh)
    plan.SMALLEST_GROUP = usual
    calls = []
    engine.model.model.layers[0].mlp.register_forward_pre_hook(
        lambda *_: calls.append(1)
    )
    engine.step(share_of(steps, mesh, config.batch_size_per_gpu)[0])
    return len(calls)


@pytest.mark.parametrize("smallest", [1, fsdp.plan.SMALLEST_GROUP])
def test_layers_that_ranks_compute_in_part_are_recomputed(smallest, tmp_path, pools):
    """Of Gemma 4 tp does not shard everything; its layer is called once more."""
    tiny.write("gemma4_text", tmp_path / "model")
    variant = ("packed", 1, "sgd")
    path = str(tmp_path / "model")
    plain = parity.make_config(path, str(tmp_path), 2, 2, variant)
    again = replace(plain, activation_checkpointing="full")
    steps = make_steps(*variant[:2])
    assert pools(4).run(count_calls, plain, steps, smallest) == [1] * 4
    assert pools(4).run(count_calls, again, steps, smallest) == [2] * 4


def look_up(vocab, padding):
    """Run by every rank: whether shards find the rows of the whole, and their gradient.

    FSDP2 warns of a module that returns a view.
    """
    mesh, same = init_device_mesh("cpu", (2,)), []
    for output in (Shard(1), Replicate()):
        torch.manual_seed(0)
        whole = nn.Embedding(vocab, 8, padding_idx=padding)
        shards = copy.deepcopy(whole)
        style = RowwiseParallel(input_layouts=Replicate(), output_layouts=output)
        parallelize_module(shards, mesh, equivalent(style))
        tokens = torch.arange(2 * vocab).remainder(vocab).view(1, -1)
        expected, weight = whole(tokens), torch.randn(1, 2 * vocab, 8)
        (expected * weight).sum().backward()
        if output.is_shard():
            rank = mesh.get_local_rank()
            expected, weight = expected.chunk(2, 1)[rank], weight.chunk(2, 1)[rank]
        got = shards(tokens)
        (got * weight).sum().backward()
        same += [torch.equal(got, expected), not got._is_view()]
        same += [torch.equal(shards.weight.grad.full_tensor(), whole.weight.grad)]
    return same


@pytest.mark.parametrize("vocab", [50, 51])
@pytest.mark.parametrize("padding", [None, 0, 25, 49])
def test_embedding_looks_up_its_own_rows(vocab, padding, pools):
    """A row of padding gets no gradient, on whichever rank it is."""
    for same in pools(2).run(look_up, vocab, padding):
        assert all(same), same


def load_untied(config):
    """Run by every rank: a plan whose reader forgot to tie the weights again."""
    from tp2d_lib.fsdp import build_engine
    from tp2d_lib.fsdp.plan import apply_fsdp
    from tp2d_lib.mesh import build_mesh

    def parallelize(model, mesh, dtype, stream):
        parallelize_module(model, mesh["tp"], tensor_parallel_plan(model))
        apply_fsdp(model, mesh["dp"], dtype)
        return model

    try:
        build_engine(config, build_mesh(config.dp_size, config.tp_size), parallelize)
    except ValueError as error:
        return str(error)


def test_weight_that_no_file_fills_is_named(demo_paths, pools, tmp_path):
    config = make_config(demo_paths, tmp_path, 2, 2)
    for message in pools(4).run(load_untied, config):
        assert "must hold lm_head.weight (1 missing)" in message


def train_from_own_seed(config, steps):
    """Run by every rank: its generator once it is built, losses and norms."""
    from tp2d_lib.fsdp import build_engine
    from tp2d_lib.mesh import build_mesh

    mesh = build_mesh(config.dp_size, config.tp_size)
    engine = build_engine(config, mesh)
    state = torch.get_rng_state()
    batches = share_of(steps, mesh, config.batch_size_per_gpu)
    return state, [tuple(map(float, engine.step(batch))) for batch in batches]


def test_what_all_tp_ranks_compute_drops_out_the_same(pools, tmp_path):
    """Phi-3 gathers query, key and value: every rank attends with all heads."""
    path = write_model("phi3", tmp_path, attention_dropout=0.3)
    config = parity.make_config(path, str(tmp_path), 2, 1, ("packed", 1, "sgd"))
    steps = make_steps("packed", 1)[:2]
    for state, got in pools(2).run(train_from_own_seed, config, steps):
        losses, norms, _ = reference.train(
            path, "sgd", steps, config.max_grad_norm, rng_state=state
        )
        torch.testing.assert_close([g[0] for g in got], losses, rtol=1e-5, atol=0)
        torch.testing.assert_close([g[1] for g in got], norms, rtol=1e-4, atol=0)
    with pytest.raises(
        ConfigError, match=r"Phi3ForCausalLM has dropout where .*'auto'"
    ):
        fsdp.check(replace(config, sequence_parallel="always"))


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"compile": True}, "compile=True works only with models of which every block"),
        ({"sequence_parallel": "always"}, "has blocks that each tp rank computes in"),
    ],
)
def test_what_a_model_with_whole_blocks_cannot_do(settings, sentence, tmp_path):
    path = write_model("stablelm", tmp_path)
    config = parity.make_config(path, str(tmp_path), 2, 1, ("packed", 1, "sgd"))
    fsdp.check(config)
    with pytest.raises(ConfigError, match=sentence):
        fsdp.check(replace(config, **settings))
