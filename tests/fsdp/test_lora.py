"""LoRA under tp and dp: as one process trains it, and adapters alone are kept."""

import json
from dataclasses import replace
from functools import cache, partial

import pytest
import torch
import torch.distributed.checkpoint as dcp
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModelForCausalLM, GPT2Config

from tests.fsdp.test_parity import train_on_mesh
from tests.support import lora, reference
from tests.support.demo import make_config as make_demo_config
from tests.support.models import write_model
from tests.support.parity import (
    MAX_GRAD_NORM,
    assert_weights_equal,
    make_steps,
)
from tests.test_config import refuse_field
from tp2d_lib import autotp, data, fsdp
from tp2d_lib.config import ConfigError, TrainConfig
from tp2d_lib.model import build_empty_model
from tp2d_lib.model.lora import LoRALinear, alpha_of
from tp2d_lib.model.optimizer import build_optimizer
from tp2d_lib.run.metrics import flops_per_token

RANK, SCALE = 3, 2.0  # lora_alpha is twice the rank if it is left out
MODELS = ("qwen2-tied", "llama", "phi3")  # biases; untied; fused weights
MESHES = [(1, 1), (2, 1), (2, 2), (1, 4)]  # (tp_size, dp_size)
VARIANTS = [("padded", 2, "sgd"), ("packed", 1, "adamw")]
LARGE = {"initializer_range": 0.2}  # so that gradients of adapters are no dust


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    return {name: write_model(name, folder, **LARGE) for name in MODELS}


@pytest.fixture(scope="module")
def references(models):
    """``references(name, variant)``: losses, norms and weights of one process."""

    def adapt(model):
        lora.add(model, lora.linear_layers(model), RANK, SCALE)

    @cache
    def train(name, variant):
        steps = make_steps(*variant[:2])
        options = (variant[2], steps, MAX_GRAD_NORM)
        return reference.train(models[name], *options, adapt=adapt)

    return train


@pytest.mark.parametrize(
    ("name", "mesh"),
    [*(("qwen2-tied", mesh) for mesh in MESHES), ("llama", (2, 2)), ("phi3", (2, 1))],
    ids=str,
)
def test_mesh_equals_one_process(name, mesh, models, references, pools, tmp_path):
    options = ((*mesh, 1), VARIANTS, str(tmp_path), {"lora_rank": RANK})
    answers = pools(mesh[0] * mesh[1]).run(train_on_mesh, models[name], *options)
    for variant, *ranks in zip(VARIANTS, *answers, strict=True):
        losses, norms, weights = references(name, variant)
        for got in ranks:  # the same numbers on every rank
            torch.testing.assert_close(got[0], losses, rtol=1e-5, atol=0)
            torch.testing.assert_close(got[1], norms, rtol=1e-4, atol=0)
        assert ranks[0][2].keys() == weights.keys()
        assert_weights_equal(ranks[0][2], weights, variant)


def test_reference_clips_and_moves(models, references):
    """The comparison means something: adapters move far, and nothing else does."""
    for name in MODELS:
        before = AutoModelForCausalLM.from_pretrained(models[name]).state_dict()
        for variant in VARIANTS:
            _, norms, weights = references(name, variant)
            assert max(norms) > MAX_GRAD_NORM
            for key, weight in weights.items():
                if key.endswith("lora_B"):
                    assert weight.abs().max() > 1e-3, key
                elif not key.endswith("lora_A"):
                    assert torch.equal(weight, before[key]), key


@pytest.fixture(scope="module")
def storage(tmp_path_factory):
    return tmp_path_factory.mktemp("storage")


@pytest.fixture(scope="module")
def adapted(demo_paths, storage):
    config = make_demo_config(demo_paths, storage, 2, 2)
    config = replace(config, lora_rank=RANK)
    data.prepare(config)
    return config


def steps_of(config, load, position, count, save=None, export=None):
    """Run by every rank: losses of some steps, weights; loads before, saves after."""
    from tp2d_lib.data import build_dataloader
    from tp2d_lib.fsdp import build_engine
    from tp2d_lib.mesh import build_mesh

    mesh = build_mesh(config.dp_size, config.tp_size)
    engine, loader = build_engine(config, mesh), build_dataloader(config, mesh)
    if load:
        engine.load(load)
    loader.position = position
    losses = [
        float(engine.step(batch)[0])
        for batch, _ in zip(loader, range(count), strict=False)
    ]
    if save:
        engine.save(save)
    said = engine.export(export) if export else None
    named = engine.model.named_parameters()
    return losses, {k: p.full_tensor().detach() for k, p in named}, said


@pytest.fixture(scope="module")
def halfway(adapted, storage, pools):
    """Six steps on 2x2 without a stop, and a checkpoint after three of them."""
    folder = str(storage / "halfway")
    whole = pools(4).run(steps_of, adapted, None, 0, 6)
    pools(4).run(steps_of, adapted, None, 0, 3, folder)
    return whole[0], folder, 3 * adapted.global_batch_size


def test_resume_is_bit_equal(adapted, halfway, pools):
    (losses, weights, _), folder, position = halfway
    again = pools(4).run(steps_of, adapted, folder, position, 3)
    assert again[0][0] == losses[3:]
    assert all(torch.equal(again[0][1][name], w) for name, w in weights.items())


@pytest.mark.parametrize("tp_size", [1, 4])
def test_resume_on_another_mesh(adapted, halfway, pools, tp_size):
    (losses, weights, _), folder, position = halfway
    sizes = {"tp_size": tp_size, "dp_size": 4 // tp_size}
    sizes |= {"batch_size_per_gpu": adapted.global_batch_size // sizes["dp_size"]}
    moved = pools(4).run(steps_of, replace(adapted, **sizes), folder, position, 3)
    torch.testing.assert_close(moved[0][0], losses[3:], rtol=1e-5, atol=0)
    for name, weight in weights.items():
        torch.testing.assert_close(moved[0][1][name], weight, rtol=0, atol=1e-4)


def test_a_checkpoint_holds_adapters_alone(adapted, halfway):
    named = build_empty_model(adapted).named_parameters()
    trained = {name: p.shape for name, p in named if p.requires_grad}
    stored = dcp.FileSystemReader(halfway[1]).read_metadata().state_dict_metadata
    tensors = {k: v.size for k, v in stored.items() if getattr(v, "size", ())}
    moments = ("exp_avg", "exp_avg_sq")
    kept = {f"model.{name}": shape for name, shape in trained.items()}
    for name in moments:
        kept |= {f"optimizer.state.{k}.{name}": shape for k, shape in trained.items()}
    assert {k: v for k, v in tensors.items() if "rng" not in k} == kept


@pytest.mark.parametrize("merge", [False, True])
def test_exports(adapted, halfway, pools, tmp_path, merge):
    """The adapters as PEFT has them, or a model with them added."""
    (_, weights, _), folder, position = halfway
    target = tmp_path / "out"
    target.mkdir()
    for name in ("adapter_config.json", "model.safetensors", "notes.txt"):
        (target / name).write_text("of an earlier export, or somebody's")
    config = replace(adapted, export_to=str(target), merge_adapter=merge)
    found = pools(4).run(steps_of, config, folder, position, 3, None, str(target))
    assert (target / "notes.txt").exists()
    assert all(torch.equal(found[0][1][k], w) for k, w in weights.items())
    if merge:
        assert found[0][2] == f"exported to {target} in float32"
        assert not list(target.glob("adapter*"))
        model = AutoModelForCausalLM.from_pretrained(target)
        expected = lora.merged(weights, SCALE)
        for name, weight in model.named_parameters():
            torch.testing.assert_close(weight, expected[name], rtol=0, atol=1e-6)
        return
    said = f"exported to {target} in float32: adapters, without the model"
    assert found[0][2] == said
    assert not (target / "model.safetensors").exists()
    tensors = load_file(target / "adapter_model.safetensors")
    assert tensors.keys() == {
        f"base_model.model.{name}.weight" for name in weights if "lora_" in name
    }
    for name, tensor in tensors.items():
        own = name.removeprefix("base_model.model.").removesuffix(".weight")
        assert torch.equal(tensor, weights[own])
    about = json.loads((target / "adapter_config.json").read_text())
    assert (about["peft_type"], about["r"], about["lora_alpha"]) == ("LORA", 3, 6)
    assert about["base_model_name_or_path"] == adapted.model_name
    columns = {"q_proj", "k_proj", "v_proj", "gate_proj", "up_proj"}
    assert {*about["target_modules"]} == columns | {"o_proj", "down_proj"}


def dtypes(config):
    """Run by every rank: the types of frozen and of trained weights, and a loss."""
    from tp2d_lib.fsdp import build_engine
    from tp2d_lib.mesh import build_mesh

    mesh = build_mesh(config.dp_size, config.tp_size)
    engine = build_engine(config, mesh)
    batch = next(iter(data.build_dataloader(config, mesh)))
    loss = float(engine.step(batch)[0])
    named = list(engine.model.parameters())
    kinds = [{p.dtype for p in named if p.requires_grad == is_on} for is_on in (0, 1)]
    return *kinds, {p.dtype for p in engine.optimizer.state}, loss


def test_the_base_is_stored_in_the_type_it_is_computed_in(adapted, pools):
    config = replace(adapted, dtype="bfloat16")
    *kinds, loss = pools(4).run(dtypes, config)[0]
    assert kinds == [{torch.bfloat16}, {torch.float32}, {torch.float32}]
    wanted = pools(4).run(dtypes, adapted)[0][-1]
    assert loss == pytest.approx(wanted, rel=5e-3)
    assert loss != wanted


def test_alpha_weights_and_dropout_drops():
    torch.manual_seed(0)
    make = partial(TrainConfig, lora_rank=4, cache_dir="/", storage_path="/")
    layer = LoRALinear(nn.Linear(64, 8), make(lora_alpha=2.0, lora_dropout=0.5))
    a, b, x = torch.randn(4, 64), torch.randn(8, 4), torch.randn(3, 64)
    layer.lora_A, layer.lora_B = nn.Parameter(a), nn.Parameter(b)
    base = F.linear(x, layer.weight, layer.bias)
    expected = base + 0.5 * x @ a.T @ b.T
    torch.testing.assert_close(layer.eval()(x), expected)
    drawn = torch.stack([layer.train()(x) for _ in range(20_000)])
    assert not torch.equal(drawn[0], drawn[1])
    error = (drawn.mean(0) - expected).abs() / (expected - base).abs().mean()
    assert error.max() < 0.1  # unbiased
    assert alpha_of(make()) == 8


def test_some_layers_only(demo_paths, tmp_path):
    make = partial(make_demo_config, demo_paths, tmp_path, 1, 1, lora_rank=2)
    model = build_empty_model(make(lora_target_modules="q_proj, v_proj"))
    kinds = {n.split(".")[-2] for n, p in model.named_parameters() if p.requires_grad}
    assert kinds == {"q_proj", "v_proj"}
    config = make(lora_target_modules="q_proj,query")
    check = lambda **_: fsdp.check(config)  # noqa: E731
    wrong = ("lora_target_modules", "q_proj,query")
    said = refuse_field(check, *wrong, "must be names of linear layers")
    assert said.endswith("'q_proj,k_proj,v_proj,o_proj,gate_proj,up_proj,down_proj'")


def test_what_cannot_have_adapters_is_refused(demo_paths, tmp_path):
    make = partial(make_demo_config, demo_paths, tmp_path, 1, 1, device="cpu")
    config = make(lora_rank=2)
    check = lambda **_: autotp.check(config)  # noqa: E731
    refuse_field(check, "lora_rank", 2, "works with FSDP2 only")
    for name, value in {
        "lora_alpha": 4.0,
        "lora_dropout": 0.1,
        "lora_target_modules": "q_proj",
        "merge_adapter": True,
    }.items():
        refuse_field(TrainConfig, name, value, "must be combined with lora_rank")
    GPT2Config(n_layer=2, n_embd=64, n_head=4).save_pretrained(tmp_path / "gpt2")
    with pytest.raises(ConfigError, match=r"GPT2LMHeadModel has none; try lora_rank"):
        build_empty_model(replace(config, model_name=str(tmp_path / "gpt2")))


def test_a_frozen_weight_costs_two_thirds(demo_paths, tmp_path):
    """Of a product's three, the one for its own gradient is left out."""
    config = make_demo_config(demo_paths, tmp_path, 1, 1)
    whole = flops_per_token(build_empty_model(config), 128)
    model = build_empty_model(replace(config, lora_rank=2))
    sizes = {True: 0, False: 0}
    for parameter in model.parameters():
        sizes[parameter.requires_grad] += parameter.numel()
    attention = whole - 6 * sizes[False]
    assert attention > 0
    expected = attention + 4 * sizes[False] + 6 * sizes[True]
    assert flops_per_token(model, 128) == pytest.approx(expected)


def with_norm(model, config, **options):
    model.model.norm.weight.requires_grad_(True)
    return build_optimizer(model, config, **options)


def train_norm_too(config, folder):
    """Run by every rank: what an export says, and whether a checkpoint brings all."""
    from tp2d_lib.fsdp import build_engine
    from tp2d_lib.mesh import build_mesh

    mesh = build_mesh(config.dp_size, config.tp_size)
    engine = build_engine(config, mesh, build_optimizer=with_norm)
    engine.step(next(iter(data.build_dataloader(config, mesh))))
    engine.save(f"{folder}/checkpoint")
    fresh = build_engine(config, mesh, build_optimizer=with_norm)
    before = fresh.model.model.norm.weight.full_tensor().clone()
    fresh.load(f"{folder}/checkpoint")
    norms = (each.model.model.norm.weight.full_tensor() for each in (engine, fresh))
    moved, loaded = norms
    assert torch.equal(moved, loaded)
    assert not torch.equal(moved, before)
    return engine.export(f"{folder}/out")


def test_what_is_trained_besides_adapters_is_kept_and_told(adapted, tmp_path, pools):
    said = pools(4).run(train_norm_too, adapted, str(tmp_path))[0]
    assert said.endswith(
        " and model.norm.weight, which was trained too: try merge_adapter"
    )
