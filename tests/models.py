"""Tiny model directories, one for each architecture, with an odd vocabulary."""

from pathlib import Path

import torch
from transformers import (
    AutoModelForCausalLM,
    Gemma3TextConfig,
    GemmaConfig,
    GPTBigCodeConfig,
    GPTNeoXConfig,
    LlamaConfig,
    Phi3Config,
    Qwen2Config,
    Qwen3Config,
    StableLmConfig,
)

CONFIGS = {
    "qwen2-tied": (Qwen2Config, {"tie_word_embeddings": True}),
    "qwen3": (Qwen3Config, {"tie_word_embeddings": False, "head_dim": 8}),
    "llama": (LlamaConfig, {"tie_word_embeddings": False}),
    # norms after the blocks, a scaled embedding, two kinds of rotary frequencies
    "gemma3": (Gemma3TextConfig, {"head_dim": 8, "sliding_window": 64}),
}
# Not for the PyTorch engine: fused weights; no published plan at all.
OTHERS = {
    "phi3": (Phi3Config, {"tie_word_embeddings": False, "pad_token_id": 0}),
    "phi3-tied": (Phi3Config, {"tie_word_embeddings": True, "pad_token_id": 0}),
    "phi3-mha": (Phi3Config, {"num_key_value_heads": 8, "pad_token_id": 0}),
    "gpt-neox": (GPTNeoXConfig, {"hidden_dropout": 0.0}),  # heads interleaved
    "bigcode": (GPTBigCodeConfig, {"multi_query": True}),
    "gemma": (GemmaConfig, {"head_dim": 8}),
    "stablelm": (StableLmConfig, {"tie_word_embeddings": False}),
}
VOCAB_SIZE = 509  # prime: no tp_size divides it


def write_model(name: str, directory: Path, dtype=torch.float32, **overrides) -> str:
    """Write the architecture ``name`` with random weights; returns its path."""
    kind, settings = {**CONFIGS, **OTHERS}[name]
    sizes = {
        "vocab_size": VOCAB_SIZE,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "max_position_embeddings": 128,
    }
    torch.manual_seed(1)
    model = AutoModelForCausalLM.from_config(
        kind(**{**sizes, **settings, **overrides}), dtype=dtype
    )
    for name_, parameter in model.named_parameters():
        if "norm" in name_ or name_.endswith("bias"):  # else all ones or zeros
            torch.nn.init.normal_(parameter, parameter.mean().item(), 0.2)
    model.save_pretrained(directory / name)
    return str(directory / name)
