"""LoRA in one process, by hooks on plain transformers: nothing of this project."""

import math

import torch
import torch.nn.functional as F
from torch import nn


def linear_layers(model) -> list[str]:
    """All but the head; of an architecture without experts, what has adapters."""
    head = model.get_output_embeddings()
    linear = {n: m for n, m in model.named_modules() if type(m) is nn.Linear}
    return [name for name, module in linear.items() if module is not head]


def add(model, names: list[str], rank: int, scale: float, seed: int = 42) -> None:
    """Freeze the model and add ``scale * B A x`` to these layers; B begins at zero.

    As in PEFT, A is uniform within 1 / sqrt(in).
    """
    model.requires_grad_(False)
    source = torch.Generator().manual_seed(seed)
    for name in names:
        module = model.get_submodule(name)
        size = module.in_features
        a = torch.empty(rank, size).uniform_(-1, 1, generator=source) / math.sqrt(size)
        module.lora_A = nn.Parameter(a)
        module.lora_B = nn.Parameter(torch.zeros(module.out_features, rank))

        def product(module, args, out):
            low = F.linear(args[0], module.lora_A)
            return out + scale * F.linear(low, module.lora_B)

        module.register_forward_hook(product)


def merged(weights: dict, scale: float) -> dict:
    """Weights of ``reference.train`` with their adapters added."""
    found = {name: weight for name, weight in weights.items() if "lora_" not in name}
    for name in [name for name in weights if name.endswith("lora_A")]:
        layer = name.removesuffix("lora_A")
        a, b = weights[name], weights[f"{layer}lora_B"]
        found[f"{layer}weight"] = found[f"{layer}weight"] + scale * b @ a
    return found
