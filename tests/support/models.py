"""Tiny model directories, one for each architecture, with an odd vocabulary."""

from pathlib import Path

import torch
from transformers import (
    AutoModelForCausalLM,
    CohereConfig,
    DogeConfig,
    Gemma2Config,
    Gemma3TextConfig,
    GemmaConfig,
    Glm4Config,
    GPTBigCodeConfig,
    GPTNeoXConfig,
    GraniteConfig,
    LlamaConfig,
    MistralConfig,
    MixtralConfig,
    Olmo2Config,
    Phi3Config,
    Qwen2Config,
    Qwen3Config,
    SmolLM3Config,
    StableLmConfig,
    Starcoder2Config,
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
    "doge": (DogeConfig, {"pad_token_id": 0}),  # a mask of its own on top of causal
    "stablelm": (StableLmConfig, {"tie_word_embeddings": False}),
}
# One of each family of the README's table that is not above.
FAMILIES = {
    # attention and MLP side by side
    "cohere": (CohereConfig, {"logit_scale": 0.5, "pad_token_id": 0}),
    "gemma2": (Gemma2Config, {"head_dim": 8, "sliding_window": 64}),  # soft-capped
    "glm4": (Glm4Config, {"head_dim": 8, "pad_token_id": 0}),  # half of it fused
    # multipliers, none at its default
    "granite": (
        GraniteConfig,
        {
            "attention_multiplier": 0.25,
            "embedding_multiplier": 12.0,
            "logits_scaling": 2.0,
            "residual_multiplier": 0.22,
        },
    ),
    "mistral": (MistralConfig, {"sliding_window": 64}),
    "mixtral": (MixtralConfig, {"num_local_experts": 4}),
    "olmo2": (Olmo2Config, {"pad_token_id": 0}),  # norms over all heads together
    # every second layer without rotary positions
    "smollm3": (SmolLM3Config, {"no_rope_layer_interval": 2, "pad_token_id": 0}),
    "starcoder2": (Starcoder2Config, {}),  # biases everywhere
}
VOCAB_SIZE = 509  # prime: no tp_size divides it


def write_model(name: str, directory: Path, dtype=torch.float32, **overrides) -> str:
    """Write the architecture ``name`` with random weights; returns its path."""
    kind, settings = {**CONFIGS, **OTHERS, **FAMILIES}[name]
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
