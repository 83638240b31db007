"""DeepSpeed's configuration: ZeRO stage, precision, what is cut."""

from __future__ import annotations

import torch

from tp2d_lib.config import ConfigError, TrainConfig
from tp2d_lib.model import device_type, pick_dtype


def check_precision(config: TrainConfig) -> None:
    """Refuse what DeepSpeed would compute wrongly, or not at all.

    Raises:
        ConfigError: a precision that the ZeRO stage or the hardware does not allow.
    """
    for name in ("autocast", "async_checkpoint"):
        if getattr(config, name):
            raise ConfigError(f"{name}=True must be left to FSDP2; try {name}=False")
    where = device_type(config)
    dtype, _ = pick_dtype(config, where)
    half = dtype in (torch.bfloat16, torch.float16)
    if config.zero_stage == 0 and half and config.tp_size > 1:
        # DeepSpeed 0.19.8 takes a tp rank's share of the norm for all of it.
        raise ConfigError(
            f"zero_stage=0 must not meet {config.dtype} and tp_size={config.tp_size}: "
            "DeepSpeed then clips to a wrong gradient norm; try zero_stage=1"
        )
    if config.bf16_master_weights and (
        dtype != torch.bfloat16 or config.zero_stage == 0
    ):
        raise ConfigError(
            f"bf16_master_weights=True must go with bfloat16 and ZeRO 1 to 3, not with "
            f"{dtype} and zero_stage={config.zero_stage}; try dtype='bfloat16' and "
            "zero_stage=1"
        )
    if dtype == torch.float16 and where == "cpu" and not cpu_has_float16():
        raise ConfigError(
            "dtype='float16' must run on a GPU, or a CPU that computes in float16; "
            "try dtype='bfloat16'"
        )


def cpu_has_float16() -> bool:
    from deepspeed.accelerator import get_accelerator  # deferred: slow to import

    return get_accelerator().is_fp16_supported()


def deepspeed_config(config: TrainConfig) -> dict:
    """The dictionary that DeepSpeed reads, in one place."""
    where = device_type(config)
    on_gpu = where == "cuda"  # CPUs have no second stream to overlap with
    dtype, _ = pick_dtype(config, where)
    masters = config.zero_stage > 0 and not config.bf16_master_weights
    accumulate = "fp32" if dtype == torch.bfloat16 and masters else None
    return {
        "train_micro_batch_size_per_gpu": config.batch_size_per_gpu,
        "gradient_accumulation_steps": config.gradient_accumulation_steps,
        "gradient_clipping": config.max_grad_norm,
        "tensor_parallel": {
            "autotp_size": config.tp_size,
            "preset_model": config.tp_preset,
            "partition_config": config.partition_config,
            "vocab_parallel_lm_head": cuts_vocabulary(config),
            "tp_overlap_comm": True,  # with the gradient of the same weight
        },
        "zero_optimization": {
            "stage": config.zero_stage,
            "overlap_comm": on_gpu,
            "reduce_bucket_size": 50_000_000,  # its default, 5e8, is a buffer of 2 GB
            "stage3_gather_16bit_weights_on_model_save": True,  # for export
        },
        "bf16": {  # fp32 masters, unless asked otherwise
            "enabled": dtype == torch.bfloat16,
            "bf16_master_weights_and_grads": config.bf16_master_weights,
            "bf16_optimizer_states": config.bf16_master_weights,
        },
        "fp16": {"enabled": dtype == torch.float16},  # with dynamic loss scaling
        "communication_data_type": "fp32",  # gradients; left out: as computed
        "data_types": {"grad_accum_dtype": accumulate},
        "zero_allow_untested_optimizer": True,  # torch's own AdamW and SGD
        "steps_per_print": 10**9,  # the loop prints
    }


def cuts_vocabulary(config: TrainConfig) -> bool:
    return config.tp_size > 1 and config.vocab_parallel_lm_head
