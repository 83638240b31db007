"""Layers that DeepSpeed shards differently from what a model needs."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

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


@contextmanager
def sizes_kept(model: PreTrainedModel, sharded: Iterable[str]) -> Iterator[None]:
    """Let modules around the blocks keep their numbers of heads and features.

    DeepSpeed divides them in every module that holds something sharded, though the rest
    of it may count on all heads.

    Args:
        sharded: names of the modules that DeepSpeed shards.
    """
    around = set()
    for name in sharded:
        block = name.rpartition(".")[0]
        while block := block.rpartition(".")[0]:
            around.add(block)
    modules = [module for name, module in model.named_modules() if name in around]
    sizes = [
        {key: value for key, value in vars(module).items() if type(value) is int}
        for module in modules
    ]
    yield
    for module, before in zip(modules, sizes, strict=True):
        vars(module).update(before)


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
