"""Whether DeepSpeed shards embedding, head and loss over the vocabulary."""

from __future__ import annotations

import inspect
from dataclasses import replace

from deepspeed.module_inject.layers import VocabParallelEmbedding
from deepspeed.sequence.cross_entropy import validate_vocab_parallel_loss
from torch import nn

from tp2d_lib.config import TrainConfig, first_line
from tp2d_lib.model import PlanError

HEADS = ("lm_head", "embed_out")  # names that DeepSpeed knows


def decide(model: nn.Module, config: TrainConfig) -> TrainConfig:
    """Shard the vocabulary where DeepSpeed can, unless the configuration decides.

    Raises:
        PlanError: the configuration asks for what DeepSpeed cannot do.
    """
    if config.tp_size == 1 or config.vocab_parallel_lm_head is False:
        return config
    try:
        check_it_can_be_sharded(model)
    except PlanError:
        if config.vocab_parallel_lm_head:
            raise
        return replace(config, vocab_parallel_lm_head=False)  # partition.describe tells
    return replace(config, vocab_parallel_lm_head=True)


def check_it_can_be_sharded(model: nn.Module) -> None:
    """DeepSpeed replaces only plain embeddings and heads, and the standard loss."""
    head = model.get_output_embeddings()
    try:
        VocabParallelEmbedding.validate_embedding(model.get_input_embeddings())
        validate_vocab_parallel_loss(model)
        if not any(m is head and n.endswith(HEADS) for n, m in model.named_modules()):
            raise ValueError("whose head has another name than lm_head")
        if "lm_head.out_features" in inspect.getsource(type(model)):
            raise ValueError("whose loss reads an attribute that a shard has not")
    except (ValueError, NotImplementedError) as error:
        raise PlanError(
            "vocab_parallel_lm_head=True works only with models whose vocabulary "
            f"DeepSpeed can shard, which {type(model).__name__} is not "
            f"({first_line(error)}); try vocab_parallel_lm_head=False"
        ) from error
