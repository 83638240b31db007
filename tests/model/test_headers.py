"""A model's files are read as ``from_pretrained`` reads them, or refused."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.support.demo import make_config
from tests.test_config import refuse_field
from tp2d_lib import autotp, fsdp

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
