"""A Hugging Face decoder: its checks, its empty form, how it computes."""

from __future__ import annotations

import os
import shutil

import torch
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    PretrainedConfig,
)

from tp2d_lib.config import ConfigError, TrainConfig


def load_model_config(config: TrainConfig) -> PretrainedConfig:
    """The text model's own configuration, from its directory or the Hub."""
    name = config.model_name
    if os.path.isdir(name) and not os.path.isfile(os.path.join(name, "config.json")):
        raise ConfigError(
            f"model_name={name!r} must be a model directory, but has no config.json; "
            "try a directory written by save_pretrained"
        )
    try:
        return AutoConfig.from_pretrained(
            name, revision=config.model_revision
        ).get_text_config()
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"model_name={name!r} must be a model directory or a model the Hub knows; "
            f"try 'Qwen/Qwen2.5-0.5B' ({str(error).splitlines()[0]})"
        ) from error


def check_config(config: TrainConfig) -> None:
    """Check the sizes that the model decides: heads and the longest sequence."""
    hf = load_model_config(config)
    query_heads = getattr(hf, "num_attention_heads", None)
    if not query_heads or hf.is_encoder_decoder:
        raise ConfigError(
            f"model_name={config.model_name!r} must be a decoder with attention heads, "
            f"not {hf.model_type!r}; try 'Qwen/Qwen2.5-0.5B'"
        )
    heads = getattr(hf, "num_key_value_heads", None) or query_heads
    if getattr(hf, "multi_query", False):
        heads = 1
    allowed = [n for n in range(1, heads + 1) if heads % n == query_heads % n == 0]
    if config.tp_size not in allowed:
        raise ConfigError(
            f"tp_size={config.tp_size} must divide the {heads} key-value heads and the "
            f"{query_heads} query heads of {config.model_name!r}; "
            f"try one of {', '.join(map(str, allowed))}"
        )
    longest = getattr(hf, "max_position_embeddings", None)
    if longest and config.seq_length > longest:
        raise ConfigError(
            f"seq_length={config.seq_length} must be at most {longest}, the longest "
            f"sequence of {config.model_name!r}; try {longest}"
        )
    window = sliding_window(hf)
    if config.tp_size > 1 and window and config.seq_length > window:
        raise ConfigError(
            f"seq_length={config.seq_length} must be at most the sliding window of "
            f"{config.model_name!r} when tp_size > 1, because its masks would be built "
            f"for a tp rank's share of the sequence; try {window}"
        )


def sliding_window(hf: PretrainedConfig) -> int | None:
    """Tokens a sliding-window layer looks back, or None when no layer slides."""
    layers = getattr(hf, "layer_types", None)
    slides = "sliding_attention" in layers if layers else True
    return getattr(hf, "sliding_window", None) if slides else None


def device_type(config: TrainConfig) -> str:
    """ "cuda" or "cpu": what ``device`` asks for, or what is here."""
    if config.device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    return config.device


def pick_dtype(config: TrainConfig, device_type: str) -> tuple[torch.dtype, str]:
    """The compute type and the reason for it; weights and reductions stay float32."""
    if config.autocast:
        return torch.bfloat16, "bfloat16 by autocast, float32 weights and reductions"
    if config.dtype != "auto":
        return getattr(torch, config.dtype), f"dtype={config.dtype} was asked for"
    if device_type != "cuda":
        return torch.float32, "no GPU: float32 throughout"
    here = torch.cuda.is_available()  # the driver of a cluster may have no GPU
    if not here or torch.cuda.is_bf16_supported(including_emulation=False):
        return torch.bfloat16, "bfloat16 compute, float32 weights and reductions"
    name = torch.cuda.get_device_name()
    return torch.float32, f"{name} has no native bfloat16: float32 throughout"


def build_empty_model(config: TrainConfig) -> nn.Module:
    """The model with shapes and no storage: every parameter is on ``meta``."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(
            load_model_config(config), dtype=torch.float32
        )
    if config.activation_checkpointing:
        checkpoint_activations(model)
    return model.train()


def checkpoint_activations(model: nn.Module) -> None:
    """Recompute each layer in backward instead of storing its activations."""
    name = "activation_checkpointing_enable"  # its old name: transformers 5.20
    old = "gradient_checkpointing_enable"
    getattr(model, name if hasattr(model, name) else old)({"use_reentrant": False})


def compile_blocks(model: nn.Module) -> None:
    """Compile attention and MLP of each layer, when they are first called.

    Not the layer as a whole: with sequence-parallel input torch 2.13 then returns a
    wrong gradient to the embedding, and says nothing.
    """
    for layer in model.get_decoder().layers:
        for block in layer.children():
            if next(block.children(), None) is not None:  # a norm is too small
                block.compile()


def check_compiler(config: TrainConfig) -> None:
    """On CPUs torch.compile writes C++."""
    compilers = (os.environ.get("CXX", "g++"), "g++", "clang++")
    if (
        config.compile
        and device_type(config) == "cpu"
        and not any(map(shutil.which, compilers))
    ):
        raise ConfigError(
            "compile=True must find a C++ compiler, g++ or clang++, when it trains on "
            "a CPU; try compile=False"
        )
