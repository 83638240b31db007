"""A Hugging Face decoder: its checks, its empty form, its plan, its weights."""

from __future__ import annotations

import os
import re
import shutil
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint import (
    HuggingFaceStorageReader,
    HuggingFaceStorageWriter,
)
from torch.distributed.tensor import Replicate, Shard
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    PrepareModuleInput,
    RowwiseParallel,
    SequenceParallel,
)
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PretrainedConfig,
)

from tp2d_lib.config import ConfigError, TrainConfig


class PlanError(ValueError):
    """The tensor-parallel plan does not cover the model; names what is left."""


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


def pick_dtype(config: TrainConfig, device_type: str) -> tuple[torch.dtype, str]:
    """The compute type and the reason for it; weights and reductions stay float32."""
    if config.dtype != "auto":
        return getattr(torch, config.dtype), f"dtype={config.dtype} was asked for"
    if device_type != "cuda":
        return torch.float32, "no GPU: float32 throughout"
    if torch.cuda.is_bf16_supported(including_emulation=False):
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
        model.gradient_checkpointing_enable({"use_reentrant": False})
    return model.train()


def tensor_parallel_plan(model: nn.Module) -> dict:
    """Turn the model's published ``tp_plan`` into DTensor styles, sequence-parallel.

    Between blocks each tp rank keeps seq / tp rows: the residual stream is ``Shard(1)``
    of (batch, seq, hidden). A block gathers it, computes on its own heads or ffn
    columns, and scatters the sum. Keys are module names, ``*`` for a layer number.

    Raises:
        PlanError: the model publishes no plan, or one with a style not known here.
    """
    published = dict(model.tp_plan or {})
    if not any("layers" in name for name in published):
        raise PlanError(
            f"{type(model).__name__} must publish a tp_plan for its layers to be split "
            "over tp ranks, but has none; try tp_size=1"
        )
    plan = {}
    for name, module in model.named_modules():
        pattern = re.sub(r"\.\d+(?=\.|$)", ".*", name)
        style = published.get(pattern)
        if pattern in plan:
            continue
        if style is None and type(module).__name__.endswith("Norm"):
            plan[pattern] = SequenceParallel(use_local_output=True)
        elif style is not None:
            plan[pattern] = dtensor_style(pattern, style, module)
            if style == "colwise":
                parent = pattern.rpartition(".")[0]
                plan[parent] = gather_input(
                    model.get_submodule(name.rpartition(".")[0])
                )
    return plan


def dtensor_style(name: str, style: str, module: nn.Module):
    """The DTensor style of one published style; a comment says what crosses tp."""
    is_norm = type(module).__name__.endswith("Norm")
    if style == "embedding_rowwise":  # vocabulary rows; partial sums -> own rows
        return RowwiseParallel(input_layouts=Replicate(), output_layouts=Shard(1))
    if name == "lm_head" and style.startswith(
        "colwise"
    ):  # logits stay vocabulary shards
        return ColwiseParallel(
            input_layouts=Shard(1), output_layouts=Shard(-1), use_local_output=False
        )
    if style == "colwise":  # output features; nothing crosses
        return ColwiseParallel()
    if style == "rowwise":  # input features; partial sums -> own rows
        return RowwiseParallel(output_layouts=Shard(1))
    if style == "replicated_with_grad_allreduce" and is_norm:
        # A norm on local heads (batch, seq, heads, head_dim): whole weight, partial
        # gradient. Naming the head dimension makes DTensor sum it over tp.
        return SequenceParallel(sequence_dim=2, use_local_output=True)
    raise PlanError(
        f"the style {style!r} of {name!r} must be one of embedding_rowwise, colwise, "
        "rowwise, or replicated_with_grad_allreduce on a norm; try tp_size=1"
    )


def gather_input(block: nn.Module) -> PrepareModuleInput:
    """All-gather a block's rows over tp: seq / tp -> seq.

    Decoder layers call attention by keyword and the MLP by position.
    """
    if "attention_mask" in block.forward.__code__.co_varnames:
        return PrepareModuleInput(
            input_kwarg_layouts={"hidden_states": Shard(1)},
            desired_input_kwarg_layouts={"hidden_states": Replicate()},
        )
    return PrepareModuleInput(input_layouts=Shard(1), desired_input_layouts=Replicate())


def model_directory(config: TrainConfig) -> Path:
    """The folder with the model's safetensors; downloads a Hub model first."""
    if os.path.isdir(config.model_name):
        directory = Path(config.model_name)
    else:
        from huggingface_hub import snapshot_download

        directory = Path(
            snapshot_download(
                config.model_name,
                revision=config.model_revision,
                allow_patterns=["*.safetensors", "*.json", "*.txt", "*.model"],
            )
        )
    if not list(directory.glob("*.safetensors")):
        raise ConfigError(
            f"model_name={config.model_name!r} must hold safetensors files; convert it "
            "with save_pretrained, which writes them"
        )
    return directory


def own_state(model: nn.Module) -> dict[str, torch.Tensor]:
    """The model's tensors by name, a tied weight once, under the name files use."""
    tied = set(model.all_tied_weights_keys)  # second name -> first name
    return {k: v for k, v in model.state_dict().items() if k not in tied}


def load_pretrained(model: nn.Module, directory: Path) -> None:
    """Fill a sharded, empty model: each rank reads only its own slices from disk.

    Raises:
        ValueError: a parameter of the model has no tensor in the files.
    """
    reader = HuggingFaceStorageReader(str(directory))
    stored = reader.read_metadata().state_dict_metadata
    wanted = own_state(model)
    missing = sorted(set(wanted) - set(stored))
    if missing:
        raise ValueError(f"{directory} must hold {missing[0]} ({len(missing)} missing)")
    dcp.load(wanted, storage_reader=reader)


def rebuild_buffers(model: nn.Module, device: torch.device) -> None:
    """Recompute what safetensors do not hold: the rotary frequencies."""
    saved = set(model.state_dict())
    for name, module in model.named_modules():
        buffers = [key for key, _ in module.named_buffers(name, recurse=False)]
        if set(buffers) <= saved:
            continue
        fresh = type(module)(module.config)  # rotary modules are made from the config
        for key, value in fresh.named_buffers(recurse=False):
            setattr(module, key, value.to(device))


def check_whole_gradients(gradients: dict[str, torch.Tensor], group) -> None:
    """Compare gradients that every tp rank holds whole; a difference stops the run.

    A parameter used inside a sharded region gets a partial gradient. When nobody sums
    it, the ranks drift apart silently; unequal gradients are the sign.

    Args:
        gradients: name -> this rank's gradient of a parameter not cut over tp.
        group: the tp process group.
    """
    if not gradients:
        return
    flat = torch.cat([g.detach().float().flatten() for g in gradients.values()])
    low, high = flat.clone(), flat.clone()
    dist.all_reduce(low, dist.ReduceOp.MIN, group=group)
    dist.all_reduce(high, dist.ReduceOp.MAX, group=group)
    sizes = [g.numel() for g in gradients.values()]
    for name, lowest, highest in zip(
        gradients, low.split(sizes), high.split(sizes), strict=True
    ):
        apart = (highest - lowest).abs().max()
        if apart > 1e-3 * torch.maximum(highest.abs(), lowest.abs()).max():
            raise PlanError(
                f"the gradient of {name!r} must be the same on every tp rank but "
                f"differs by {apart:.3g}: the plan leaves it partial; try tp_size=1"
            )


def export(model: nn.Module, config: TrainConfig, directory: Path) -> None:
    """Write a sharded model the way ``save_pretrained`` would; every rank calls."""
    hf = load_model_config(config)
    state = {
        name: tensor.to(hf.dtype or torch.float32)
        for name, tensor in own_state(model).items()
    }
    writer = HuggingFaceStorageWriter(
        str(directory), save_distributed=True, enable_consolidation=True
    )
    dcp.save(state, storage_writer=writer)
    if dist.get_rank() == 0:
        shutil.rmtree(directory / "sharded")
        AutoConfig.from_pretrained(
            config.model_name, revision=config.model_revision
        ).save_pretrained(directory)
        AutoTokenizer.from_pretrained(
            config.model_name, revision=config.model_revision
        ).save_pretrained(directory)
    dist.barrier()
