"""LoRA (arXiv:2106.09685): small trained matrices beside frozen linear layers."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn
from torch.distributed.tensor import Replicate, distribute_tensor

from tp2d_lib.config import ConfigError, TrainConfig

A, B = "lora_A", "lora_B"
FILE, DESCRIPTION = "adapter_model.safetensors", "adapter_config.json"  # PEFT's


class LoRALinear(nn.Linear):
    """A frozen linear layer and a trained product of two matrices.

    It computes ``x W' + b + (alpha / rank) * x A' B'``, with A of shape (rank, in) and
    B of (out, rank).
    """

    def __init__(self, linear: nn.Linear, config: TrainConfig):
        size = linear.in_features, linear.out_features
        super().__init__(*size, linear.bias is not None, device="meta")
        self.weight, self.bias = linear.weight, linear.bias
        self.lora_A = nn.Parameter(self.weight.new_empty(config.lora_rank, size[0]))
        self.lora_B = nn.Parameter(self.weight.new_empty(size[1], config.lora_rank))
        self.scale = alpha_of(config) / config.lora_rank
        self.dropout = config.lora_dropout

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        low = F.linear(F.dropout(x, self.dropout, self.training), self.lora_A)
        return super().forward(x) + self.scale * F.linear(low, self.lora_B)


def alpha_of(config: TrainConfig) -> float:
    return config.lora_alpha or 2 * config.lora_rank


def add(model: nn.Module, styles: dict[str, str], config: TrainConfig) -> None:
    """Freeze an empty model, and put an adapter beside its linear layers.

    Args:
        styles: the names of the modules that can be sharded over tp.

    Raises:
        ConfigError: there is no such layer, or none of the name that is asked for.
    """
    model.requires_grad_(False)
    linear = {n: m for n in styles if type(m := model.get_submodule(n)) is nn.Linear}
    kinds = dict.fromkeys(map(last_of, linear))
    wanted = [*kinds]
    if config.lora_target_modules:
        wanted = [name.strip() for name in config.lora_target_modules.split(",")]
    if not kinds:
        raise ConfigError(
            f"lora_rank={config.lora_rank} works only with models that have linear "
            f"layers that tp can shard, but {type(model).__name__} has none; try "
            "lora_rank=0"
        )
    if not {*wanted} <= {*kinds}:
        raise ConfigError(
            f"lora_target_modules={config.lora_target_modules!r} must be names of "
            f"linear layers that tp can shard; try {','.join(kinds)!r}"
        )
    for name, module in linear.items():
        if last_of(name) in wanted:
            model.set_submodule(name, LoRALinear(module, config))


def store_base(model: nn.Module, dtype: torch.dtype) -> None:
    """Keep what has adapters in the type it is computed in: nothing updates it."""
    for parameter in model.parameters():
        if not parameter.requires_grad:
            parameter.data = parameter.data.to(dtype)


def last_of(name: str) -> str:
    return name.rpartition(".")[2]


def adapters(model: nn.Module) -> Iterator[tuple[str, LoRALinear]]:
    for name, module in model.named_modules():
        if isinstance(module, LoRALinear):
            yield name, module


def is_adapter(name: str) -> bool:
    return last_of(name) in (A, B)


@torch.no_grad()
def initialize(model: nn.Module, config: TrainConfig) -> None:
    """A as PEFT begins, by the seed alone, so that it is the same on every mesh.

    B is zero: the first step begins with the model as it is.
    """
    source = torch.Generator().manual_seed(config.seed)
    for _, module in adapters(model):
        rank, size = module.lora_A.shape
        whole = torch.empty(rank, size).uniform_(-1, 1, generator=source)
        whole /= math.sqrt(size)  # Kaiming's, with a = sqrt(5)
        where = module.lora_A.device_mesh, module.lora_A.placements
        here = whole.to(module.lora_A.device)
        module.lora_A.copy_(distribute_tensor(here, *where, src_data_rank=None))
        module.lora_B.zero_()


@torch.no_grad()
def merged(model: nn.Module) -> dict[str, torch.Tensor]:
    """The weights with their adapters added, in float32; every rank must call it.

    A rank has the rows of B that it has of the weight, and of A what tp leaves it once
    dp is gathered: their product is its part of the weight.
    """
    found = {}
    for name, module in adapters(model):
        a, mesh = module.lora_A, module.weight.device_mesh
        sharded = zip(mesh.mesh_dim_names, a.placements, strict=True)
        over_tp = [where if dim == "tp" else Replicate() for dim, where in sharded]
        here = a.redistribute(placements=over_tp).to_local()
        change = module.scale * module.lora_B.to_local() @ here
        weight = module.weight.to(torch.float32, copy=True)
        weight.to_local().add_(change)
        found[f"{name}.weight"] = weight
    return found


def state(model: nn.Module) -> dict[str, torch.Tensor]:
    """The adapters by name."""
    return {k: tensor for k, tensor in model.state_dict().items() if is_adapter(k)}


def trained(model: nn.Module) -> dict[str, torch.Tensor]:
    """What a checkpoint must hold: all else is in the files of the model."""
    return {k: p.detach() for k, p in model.named_parameters() if p.requires_grad}


def left_out(model: nn.Module) -> str:
    """For the user: what an export of adapters does not hold."""
    others = trained(model).keys() - state(model).keys()
    more = f" and {min(others, default=None)}, which was trained too: try merge_adapter"
    return f": adapters, without the model{more * bool(others)}"


def for_peft(model: nn.Module) -> dict[str, torch.Tensor]:
    """The adapters by the names that PEFT gives them."""
    return {f"base_model.model.{k}.weight": t for k, t in state(model).items()}


def write_description(model: nn.Module, config: TrainConfig, folder: Path) -> None:
    """Write what ``PeftModel.from_pretrained`` reads first."""
    about = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": config.model_name,
        "revision": config.model_revision,
        "r": config.lora_rank,
        "lora_alpha": alpha_of(config),
        "lora_dropout": config.lora_dropout,
        "target_modules": targets(model),
        "bias": "none",
        "inference_mode": True,
    }
    (folder / DESCRIPTION).write_text(json.dumps(about, indent=2) + "\n")


def targets(model: nn.Module) -> list[str]:
    """The last names of layers with adapters; whole ones if others have them too."""
    names = [name for name, _ in adapters(model)]
    kinds = {*map(last_of, names)}
    linear = [n for n, m in model.named_modules() if isinstance(m, nn.Linear)]
    others = [n for n in linear if n not in names and last_of(n) in kinds]
    return names if others else sorted(kinds)
