"""A Hugging Face decoder: its configuration, the empty model, how it computes."""

from __future__ import annotations

import os

import torch
from torch import nn
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    PretrainedConfig,
)

from tp2d_lib.config import ConfigError, TrainConfig, first_line
from tp2d_lib.model import lora
from tp2d_lib.model.blocks import STYLES, shardable
from tp2d_lib.model.files import ADAPTER, check_merged
from tp2d_lib.model.hub import refused


def load_model_config(config: TrainConfig) -> PretrainedConfig:
    """The text model's own configuration, from its directory or the Hub.

    Raises:
        ConfigError: there is none, or it is of an adapter, of a model of more than
            text, or of quantized weights.
    """
    name = config.model_name
    check_merged(os.path.isfile(os.path.join(name, ADAPTER)), config)
    if os.path.isdir(name) and not os.path.isfile(os.path.join(name, "config.json")):
        raise ConfigError(
            f"model_name={name!r} must be a model directory, but has no config.json; "
            "try a directory written by save_pretrained"
        )
    try:
        whole = AutoConfig.from_pretrained(
            name, revision=config.model_revision, trust_remote_code=False
        )
        text = whole.get_text_config()
    except Exception as error:  # a config.json can be wrong in any way
        raise refused(config, error) from error
    kinds = [MODEL_FOR_CAUSAL_LM_MAPPING.get(type(c), None) for c in (whole, text)]
    if text is not whole and (None in kinds or len(set(kinds)) > 1):
        raise ConfigError(
            f"model_name={name!r} must be a model of text only, not one that its "
            f"config.json calls {whole.model_type!r}; try 'Qwen/Qwen2.5-0.5B'"
        )
    for each in (whole, text):
        if found := getattr(each, "quantization_config", None):
            method = found.get("quant_method") if isinstance(found, dict) else found
            raise ConfigError(
                f"model_name={name!r} must hold weights in floating-point types of 16 "
                "bits or more, but its config.json has a quantization_config, of "
                f"{method!r}; try the unquantized model, or delete that key if the "
                "weights are not quantized"
            )
    return text


def device_type(config: TrainConfig) -> str:
    """ "cuda" or "cpu": the ``device`` requested, or for "auto" what is available."""
    if config.device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    return config.device


def pick_dtype(config: TrainConfig, device_type: str) -> tuple[torch.dtype, str]:
    """The compute type and the reason for it; weights and reductions stay float32."""
    if config.autocast:
        return torch.bfloat16, "bfloat16 by autocast, float32 weights and reductions"
    if config.dtype != "auto":
        return getattr(torch, config.dtype), f"dtype={config.dtype} was requested"
    if device_type != "cuda":
        return torch.float32, "no GPU: float32 throughout"
    here = torch.cuda.is_available()  # the driver of a cluster may have no GPU
    if not here or torch.cuda.is_bf16_supported(including_emulation=False):
        return torch.bfloat16, "bfloat16 compute, float32 weights and reductions"
    name = torch.cuda.get_device_name()
    return torch.float32, f"{name} has no native bfloat16: float32 throughout"


def build_empty_model(config: TrainConfig) -> nn.Module:
    """The model with shapes but no storage: every parameter is on ``meta``.

    With ``lora_rank`` it has adapters, and nothing else of it is trained.

    Raises:
        ConfigError: it lacks the attention that is asked for, or a library does.
    """
    hf, chosen = load_model_config(config), config.attn_implementation
    try:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(
                hf,
                dtype=torch.float32,
                trust_remote_code=False,
                attn_implementation=chosen,
            )
    except (ImportError, ValueError) as error:
        if chosen is None:
            raise
        raise ConfigError(
            f"attn_implementation={chosen!r} must be one that {hf.model_type} has and "
            f"that is installed ({first_line(error)}); try omitting it"
        ) from error
    if config.lora_rank:
        lora.add(model, shardable(model, STYLES), config)
    return model.train()


def decoder_layers(model: nn.Module) -> nn.ModuleList:
    """The model's layers, whatever it calls them: its largest list of modules."""
    lists = [part for part in model.modules() if isinstance(part, nn.ModuleList)]
    return max(lists, key=lambda part: sum(p.numel() for p in part.parameters()))


def decoder_of(model: nn.Module) -> nn.Module:
    """What the head works on: the part of the model that has the layers."""
    layers = decoder_layers(model)
    parts = [model.get_decoder(), *model.children()]  # the first may be the whole model
    return next(p for p in parts if p is not model and layers in [*p.modules()])


def compile_blocks(model: nn.Module, tp_size: int) -> None:
    """Compile each layer when it is first called, or its attention and MLP with tp.

    With sequence-parallel input to the layer as one, torch 2.13 would silently return a
    wrong gradient to the embedding.
    """
    for layer in decoder_layers(model):
        if tp_size == 1:
            layer.forward = torch.compile(layer.forward)  # without FSDP's hooks
            continue
        for block in layer.children():
            if next(block.children(), None) is not None:  # not a norm: too small
                block.compile()
