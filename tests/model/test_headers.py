"""A model's files are read as ``from_pretrained`` reads them, or refused."""

import json
import shutil
from importlib import import_module
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from tests.support.demo import make_config
from tests.test_config import refuse_field
from tp2d_lib import autotp, fsdp
from tp2d_lib.config import ConfigError
from tp2d_lib.model import headers

FILE = "model.safetensors"
MLP = "model.layers.0.mlp.up_proj"


@pytest.fixture
def config(demo_paths, tmp_path):
    """A config of a copy of the demo model, to be changed."""
    model = shutil.copytree(demo_paths[0], tmp_path / "model")
    return make_config((str(model), demo_paths[1]), tmp_path, 1, 1, device="cpu")


def edit(config, **keys):
    """Change the model's config.json."""
    path = Path(config.model_name, "config.json")
    path.write_text(json.dumps(json.loads(path.read_text()) | keys))


def rewrite(config, change):
    """Change the tensors in the model's file."""
    path = Path(config.model_name, FILE)
    save_file(change(load_file(path)), path, {"format": "pt"})


def refused(config, rule):
    """Both engines refuse the model in the driver, in one sentence."""
    for engine in (fsdp, autotp):
        check = lambda engine=engine, **_: engine.check(config)  # noqa: E731
        refuse_field(check, "model_name", config.model_name, rule)


def scaled(kind):
    """Weights of a type of 8 bits, and their scales."""

    def change(tensors):
        weight = tensors[f"{MLP}.weight"]
        scale = weight.abs().max() / 100
        scaled = {f"{MLP}.weight_scale": scale.reshape(1)}
        return tensors | scaled | {f"{MLP}.weight": (weight / scale).to(kind)}

    return change


def packed(tensors):
    """Weights of 4 bits as GPTQ stores them, under names of their own."""
    weight = tensors.pop(f"{MLP}.weight")
    shape = (weight.shape[1] // 8, weight.shape[0])
    return tensors | {f"{MLP}.qweight": torch.zeros(shape, dtype=torch.int32)}


@pytest.mark.parametrize(
    ("change", "rule"),
    [
        (scaled(torch.float8_e4m3fn), f"'{MLP}.weight' is quantized to F8_E4M3; try"),
        (scaled(torch.int8), f"'{MLP}.weight' is quantized to I8; try the unquantized"),
        (packed, f"'{MLP}.qweight' is quantized to I32; try the unquantized model"),
    ],
)
def test_quantized_weights_are_refused(config, change, rule):
    rewrite(config, change)
    refused(config, rule)


@pytest.mark.parametrize("method", ["fp8", "gptq", "bitsandbytes", "mxfp4"])
def test_the_method_of_quantization_is_named(config, method):
    edit(config, quantization_config={"quant_method": method})
    refused(config, f"has a quantization_config, of {method!r}; try the unquantized")


def head_only(tensors):
    """The tied matrix under its second name."""
    return {"lm_head.weight": tensors.pop("model.embed_tokens.weight"), **tensors}


def base_only(tensors):
    """The names of a model without a head."""
    return {name.removeprefix("model."): t for name, t in tensors.items()}


def twice(tensors):
    """The tied matrix under both names."""
    return tensors | {"lm_head.weight": tensors["model.embed_tokens.weight"].clone()}


def merged(tensors):
    """An adapter of the head, merged into a copy of the embedding."""
    embedding = tensors["model.embed_tokens.weight"]
    return tensors | {"lm_head.weight": embedding.flip(0).contiguous()}


TOKENS = torch.arange(3, 35)[None]


def loss(engine, config):
    """Run by every rank: the loss of the first step."""
    from tp2d_lib.mesh import build_mesh

    built = import_module(f"tp2d_lib.{engine}").build_engine(config, build_mesh(1, 1))
    return float(built.step([{"input_ids": TOKENS, "labels": TOKENS}])[0])


def assert_read_as_by_transformers(config, pools):
    model = AutoModelForCausalLM.from_pretrained(config.model_name)
    expected = model(input_ids=TOKENS, labels=TOKENS).loss.item()
    for engine in ("fsdp", "autotp"):
        checked = import_module(f"tp2d_lib.{engine}").check(config)
        found = pools(1, engine).run(loss, engine, checked)
        assert found == [pytest.approx(expected, rel=1e-6)]
    return expected


@pytest.mark.parametrize("change", [head_only, base_only, twice])
def test_other_names_are_read(config, change, pools):
    rewrite(config, change)
    assert_read_as_by_transformers(config, pools)


def test_tied_weights_that_differ_are_refused(config, pools):
    """The advice makes the model of ``from_pretrained``, which does not tie them."""
    rewrite(config, merged)
    refused(config, "ties, but 'model.embed_tokens.weight' and 'lm_head.weight' differ")
    loose = AutoModelForCausalLM.from_pretrained(config.model_name)
    expected = loose(input_ids=TOKENS, labels=TOKENS).loss.item()
    edit(config, tie_word_embeddings=False)
    assert assert_read_as_by_transformers(config, pools) == expected


def test_a_missing_weight_is_refused(config):
    rewrite(config, lambda tensors: {k: t for k, t in tensors.items() if MLP not in k})
    refused(config, f"Qwen2ForCausalLM, but lacks '{MLP}.weight' (1 missing); try")


TEXT = {
    "vocab_size": 2048,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
}


@pytest.mark.parametrize("kind", ["gemma3", "mistral3"])
def test_a_model_of_more_than_text_is_refused(config, kind):
    edit(config, model_type=kind, text_config=TEXT, vision_config={}, **TEXT)
    refused(
        config, f"a model of text only, not one that its config.json calls {kind!r}"
    )


def test_an_adapter_is_refused(config):
    """Alone, or beside weights that it may have been merged into."""
    folder, words = (
        Path(config.model_name),
        "hold a whole model, but has adapter_config",
    )
    (folder / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    refused(config, words)
    with pytest.raises(ConfigError, match=words):  # in the cache of the Hub
        headers.read_files(folder, config)
    for name in ("config.json", FILE):
        (folder / name).unlink()
    refused(config, words)
