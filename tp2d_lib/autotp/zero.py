"""DeepSpeed's configuration: ZeRO stage, precision, what is sharded."""

from __future__ import annotations

import torch

from tp2d_lib.config import TrainConfig
from tp2d_lib.model import device_type, pick_dtype


def deepspeed_config(config: TrainConfig) -> dict:
    """The complete configuration dictionary for DeepSpeed."""
    where = device_type(config)
    on_gpu = where == "cuda"  # CPUs have no second stream to overlap with
    dtype, _ = pick_dtype(config, where)
    is_half = dtype == torch.bfloat16
    rules = config.partition_config or {}
    accumulate = "fp32" if is_half and config.zero_stage > 0 else None
    return {
        "train_micro_batch_size_per_gpu": config.batch_size_per_gpu,
        "gradient_accumulation_steps": config.gradient_accumulation_steps,
        "gradient_clipping": config.max_grad_norm,
        "tensor_parallel": {
            "autotp_size": config.tp_size,
            "preset_model": rules.get("preset_model"),
            "partition_config": rules or None,
            "vocab_parallel_lm_head": shards_vocabulary(config),
            "tp_overlap_comm": True,  # with computing the weight's gradient
        },
        "zero_optimization": {
            "stage": config.zero_stage,
            "overlap_comm": on_gpu,
            "reduce_bucket_size": 50_000_000,  # its default, 5e8, is a buffer of 2 GB
            "stage3_gather_16bit_weights_on_model_save": True,  # for export
        },
        "bf16": {"enabled": is_half},  # with float32 master weights
        "fp16": {"enabled": dtype == torch.float16},  # with dynamic loss scaling
        "communication_data_type": "fp32",  # for gradients; default: compute type
        "data_types": {"grad_accum_dtype": accumulate},
        "zero_allow_untested_optimizer": True,  # torch's own AdamW and SGD
        "steps_per_print": 10**9,  # the loop prints instead
    }


def describe(config: TrainConfig) -> str:
    """What the stage costs with DeepSpeed 0.19.8's optimizer for bfloat16."""
    dtype, _ = pick_dtype(config, device_type(config))
    if config.zero_stage == 1 and dtype == torch.bfloat16:
        return (
            "; zero_stage=1 in bfloat16 reduces the whole float32 gradient after "
            "backward, zero_stage=2 during it, and keeps only a share"
        )
    return ""


def shards_vocabulary(config: TrainConfig) -> bool:
    return config.tp_size > 1 and bool(config.vocab_parallel_lm_head)
