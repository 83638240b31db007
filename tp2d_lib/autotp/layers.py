"""Layers that DeepSpeed shards differently from what a model needs."""

from __future__ import annotations

import copy

import torch
from deepspeed.module_inject.layers import (
    SubParamLinearLayer,
    VocabParallelEmbedding,
    set_autotp_mode,
)
from torch.distributed.device_mesh import DeviceMesh
from transformers import PreTrainedModel


def shard_untied_embedding(model: PreTrainedModel, mesh: DeviceMesh) -> None:
    """Shard an untied embedding over the vocabulary; AutoTP shards only a tied one."""
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    if head.weight is embedding.weight:
        return
    set_autotp_mode(training=True)
    group = mesh.get_group("tp")
    sharded = VocabParallelEmbedding(embedding, group, name="embed_tokens")
    sharded.replaced = True  # so that AutoTP leaves it as it is
    model.set_input_embeddings(sharded)


def set_local_heads(model: PreTrainedModel, tp_size: int) -> None:
    """Give attention the number of heads in its shard of a fused query, key and value.

    Phi-3 reads the number of heads from the configuration that all modules share.
    """
    for module in model.modules():
        fused = any(isinstance(part, SubParamLinearLayer) for part in module.children())
        if fused and hasattr(module, "num_key_value_groups"):
            module.config = copy.copy(module.config)
            module.config.num_attention_heads //= tp_size


def is_sharded(parameter: torch.nn.Parameter) -> bool:
    """Whether AutoTP sharded this parameter over the tp ranks."""
    return getattr(parameter, "tensor_model_parallel", False)
