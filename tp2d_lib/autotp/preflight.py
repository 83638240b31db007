"""What the DeepSpeed engine can train, checked in the driver."""

from __future__ import annotations

import json
import re
from dataclasses import replace

import torch
from deepspeed.accelerator import get_accelerator
from torch import nn

from tp2d_lib import checkpoint, store
from tp2d_lib.autotp import partition, rules, universal, vocabulary
from tp2d_lib.config import ConfigError, TrainConfig
from tp2d_lib.model import device_type, pick_dtype

# What chooses positions, and what no loss of a decoder depends on.
UNTRAINED = re.compile(r"\.(indexer|compressor|pooler)\.")


def check(config: TrainConfig, plan: bool = False) -> TrainConfig:
    """Find in the driver, before any worker starts, what cannot be trained.

    Args:
        config: with the device that the run will use.
        plan: look at the architecture only, as for a run that is not started here.

    Returns:
        The configuration for the workers, with the rules of ``partition_config`` read
        from their file, and whether the vocabulary is sharded.

    Raises:
        ConfigError: a value that the model, the data, the storage or the hardware does
            not allow, or a precision that the ZeRO stage does not allow.
        PlanError: rules that match nothing, or shard half of a pair.
    """
    from tp2d_lib.run import preflight  # here: it needs Ray, an engine does not

    config = replace(config, partition_config=rules.read(config.partition_config))
    check_precision(config)
    model, _ = preflight.check(config, "autotp", plan)
    config = vocabulary.decide(model, config)
    check_decay(model, config)
    check_experts(model, config)
    if start := checkpoint.start_of(config):
        stored = json.loads((store.path(start) / universal.LAYOUT_FILE).read_text())
        universal.check(stored, config, start)
    if config.tp_size > 1:
        names = [name for name, _ in model.named_parameters(remove_duplicate=False)]
        rules.check_time(config.partition_config, names)
        partition.check(model, config)
    return config


def check_decay(model: nn.Module, config: TrainConfig) -> None:
    """DeepSpeed updates what gets no gradient as if it were zero: it decays."""
    names = [name for name, _ in model.named_parameters() if UNTRAINED.search(name)]
    if names and config.weight_decay:
        raise ConfigError(
            f"weight_decay={config.weight_decay} must be 0 for {type(model).__name__}, "
            f"of which {names[0]!r} gets no gradient, but would decay; "
            "try weight_decay=0.0"
        )


def check_experts(model: nn.Module, config: TrainConfig) -> None:
    """DeepSpeed sums what has a gradient, which must be the same on all dp ranks."""
    if getattr(model.config, "zero_expert_num", 0) and config.dp_size > 1:
        raise ConfigError(
            f"dp_size={config.dp_size} must be 1 for {type(model).__name__}, whose "
            "experts may get no token on one of the dp ranks; try dp_size=1"
        )


def check_precision(config: TrainConfig) -> None:
    """Refuse what DeepSpeed would compute wrongly, or not at all.

    Raises:
        ConfigError: a precision that the ZeRO stage or the hardware does not allow.
    """
    only_fsdp = {
        "autocast": False,
        "async_checkpoint": False,
        "reshard_after_forward": True,
        "sequence_parallel": "auto",
    }
    for name, default in only_fsdp.items():
        if (value := getattr(config, name)) != default:
            raise ConfigError(
                f"{name}={value!r} works with FSDP2 only; try {name}={default!r}"
            )
    if config.dp_replicate_size > 1:
        # DeepSpeed 0.19.8 forms those groups of neighboring world ranks, and no MiCS.
        raise ConfigError(
            f"dp_replicate_size={config.dp_replicate_size} works with FSDP2 only, "
            "because DeepSpeed's zero_hpz_partition_size mistakes tp ranks for dp "
            "ranks; try dp_replicate_size=1"
        )
    if config.lora_rank:
        # They replace linear layers by their own, which take no matrix beside them.
        raise ConfigError(
            f"lora_rank={config.lora_rank} works with FSDP2 only, because DeepSpeed's "
            "tensor-parallel layers hold one weight each; try train_fsdp.py, or "
            "lora_rank=0"
        )
    if config.nonfinite == "skip" and config.zero_stage == 0:
        raise ConfigError(
            "nonfinite='skip' cannot be combined with zero_stage=0, which updates "
            "before it looks; try zero_stage=1"
        )
    if config.loss_chunk_tokens and config.zero_stage == 3:
        raise ConfigError(
            f"loss_chunk_tokens={config.loss_chunk_tokens} cannot be combined with "
            "zero_stage=3, which frees the head's weights before their gradient is "
            "computed; try zero_stage=2"
        )
    if config.activation_checkpointing == "selective" and config.zero_stage == 3:
        raise ConfigError(
            "activation_checkpointing='selective' cannot be combined with "
            "zero_stage=3, which gathers weights between the operators that are to be "
            "recognized; try 'full'"
        )
    convertible = config.optimizer == "adamw" and config.zero_stage > 0
    if config.min_dp_size and not convertible:
        raise ConfigError(
            f"min_dp_size={config.min_dp_size} must be combined with optimizer='adamw' "
            "and zero_stage 1 to 3, which DeepSpeed can convert for fewer ranks; try "
            "min_dp_size=None"
        )
    where = device_type(config)
    dtype, _ = pick_dtype(config, where)
    half = dtype in (torch.bfloat16, torch.float16)
    if config.zero_stage == 0 and half:
        # DeepSpeed 0.19.8 decays weights nearly twice, and mistakes a tp rank's share
        # of the norm for the global norm.
        raise ConfigError(
            f"zero_stage=0 cannot be combined with {dtype}, because DeepSpeed then "
            "decays weights too much and, with tp, clips to a wrong gradient norm; try "
            "zero_stage=1"
        )
    if half and config.export_dtype == "float32":
        raise ConfigError(
            f"export_dtype='float32' cannot be combined with {dtype}, in which "
            "DeepSpeed gathers weights; try export_dtype='auto'"
        )
    on_cpu = dtype == torch.float16 and where == "cpu"
    if on_cpu and not get_accelerator().is_fp16_supported():
        raise ConfigError(
            "dtype='float16' must run on a GPU, or on a CPU that supports float16; "
            "try dtype='bfloat16'"
        )
