"""Models of real sizes with random weights, and a minimal loop to compare with."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn
from torch.distributed.tensor import DTensor
from transformers import AutoModelForCausalLM, Qwen2Config

from tp2d_lib import model as models
from tp2d_lib.config import TrainConfig
from tp2d_lib.model.weights import rebuild_buffers

# vocabulary, hidden size, ffn size, layers, heads, key-value heads, tied: those of
# Qwen2.5, from the models' config.json; "tiny" is for a machine without a GPU.
SHAPES = {
    "tiny": (2048, 128, 352, 4, 4, 2, True),
    "0.5b": (151_936, 896, 4864, 24, 14, 2, True),
    "1.5b": (151_936, 1536, 8960, 28, 12, 2, True),
    "3b": (151_936, 2048, 11_008, 36, 16, 2, True),
    "7b": (152_064, 3584, 18_944, 28, 28, 4, False),
    "14b": (152_064, 5120, 13_824, 48, 40, 8, False),
    "32b": (152_064, 5120, 27_648, 64, 40, 8, False),
    "72b": (152_064, 8192, 29_568, 80, 64, 8, False),
}


def write_config(name: str, folder: Path) -> Path:
    vocabulary, hidden, ffn, layers, heads, kv_heads, tied = SHAPES[name]
    Qwen2Config(
        vocab_size=vocabulary,
        hidden_size=hidden,
        intermediate_size=ffn,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        tie_word_embeddings=tied,
        max_position_embeddings=32_768,
        architectures=["Qwen2ForCausalLM"],
    ).save_pretrained(folder / name)
    return folder / name


@torch.no_grad()
def fill_shards(model: nn.Module, config: TrainConfig, device: torch.device) -> None:
    """Random weights for an empty, sharded model."""
    model.to_empty(device=device)
    rebuild_buffers(model, models.build_empty_model(config))
    for name, parameter in model.named_parameters():
        shard = parameter.to_local() if isinstance(parameter, DTensor) else parameter
        if parameter.dim() > 1:
            shard.normal_(std=0.02)
        else:
            shard.fill_(name.endswith("norm.weight"))


def full_model(config: TrainConfig) -> nn.Module:
    """The whole model in float32, as every rank of the DeepSpeed engine begins with."""
    hf = models.load_model_config(config)
    with torch.device(config.device):
        return AutoModelForCausalLM.from_config(
            hf, dtype=torch.float32, attn_implementation=config.attn_implementation
        ).train()


class MinimalLoop:
    """What a short script would do on one GPU, in the same precision: the limit.

    bfloat16 weights and gradients for the model, float32 ones for AdamW.
    """

    def __init__(self, config: TrainConfig, device: torch.device):
        self.model = full_model(config)
        self.masters = [p.detach().clone() for p in self.model.parameters()]
        half, _ = models.pick_dtype(config, device.type)
        for parameter in self.model.parameters():  # not the rotary frequencies
            parameter.data = parameter.data.to(half)
        models.checkpoint_activations(self.model, config)
        if config.compile:
            models.compile_blocks(self.model, 1)
        self.optimizer = torch.optim.AdamW(self.masters, lr=1e-5, fused=True)
        self.device = device

    def step(self, batch: list[dict]) -> tuple[torch.Tensor, torch.Tensor]:
        [micro] = batch
        inputs = {name: t.to(self.device) for name, t in micro.items()}
        loss = self.model(**inputs, use_cache=False).loss
        loss.backward()
        weights = list(self.model.parameters())
        for master, weight in zip(self.masters, weights, strict=True):
            master.grad = weight.grad.float()
            weight.grad = None
        norm = nn.utils.clip_grad_norm_(self.masters, 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
        torch._foreach_copy_([w.detach() for w in weights], self.masters)
        return loss.detach(), norm


def build(engine: str, config: TrainConfig, mesh) -> Callable:
    """The ``step`` of an engine with random weights."""
    if engine == "minimal":
        return MinimalLoop(config, torch.device(mesh.device_type)).step
    if engine == "fsdp":
        from tp2d_lib import fsdp

        return fsdp.build_engine(config, mesh, load=fill_shards).step
    from tp2d_lib import autotp

    return autotp.build_engine(config, mesh, load=full_model).step
