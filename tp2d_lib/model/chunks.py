"""Head and loss for some of the tokens at a time, so that few logits exist at once.

A logit costs up to 16 bytes while its loss is computed: itself, its float32 copy, and
what the softmax and its gradient hold. With 152,000 of them for every token that is
often more than the whole decoder keeps. Liger's fused linear cross-entropy computes the
gradient in the forward pass, too, but for a whole vocabulary; its cross-entropy for one
that is sharded over tp (since Liger 0.8.1) needs all logits at once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial

import torch
import torch.nn.functional as F
from torch import nn
from torch.distributed.tensor import DTensor
from transformers.modeling_outputs import CausalLMOutputWithPast, ModelOutput

from tp2d_lib.config import TrainConfig
from tp2d_lib.model.architecture import decoder_of, device_type
from tp2d_lib.model.attention import IGNORED
from tp2d_lib.model.guards import PlanError

MANY = 2**22  # logits on a rank, from which on they are computed in chunks by default
# Tokens in one of those: enough for a GPU's matrix units, few enough for a CPU's cache.
CHUNK = {"cuda": 1024, "cpu": 256}


def chunk_tokens(config: TrainConfig, vocab_size: int) -> int:
    """How many tokens of a micro-batch share a chunk; 0 without chunks."""
    tokens = config.batch_size_per_gpu * config.seq_length
    if config.loss_chunk_tokens is not None:
        return config.loss_chunk_tokens
    shards = 1 if config.vocab_parallel_lm_head is False else config.tp_size
    many = tokens * vocab_size // shards > MANY and config.dtype != "float16"
    return CHUNK[device_type(config)] if many else 0


def compute_loss_in_chunks(
    model: nn.Module, config: TrainConfig, sequence_shards: int = 1
) -> None:
    """Let the model, called for its loss, compute head and loss chunk by chunk.

    The model's own code computes them, with its scaling, its soft cap and its sharded
    vocabulary; it is only given some of the hidden states at a time. Nothing changes
    if one chunk holds all tokens.

    Args:
        sequence_shards: tp ranks that the decoder leaves the hidden states sharded
            over, as seq / shards positions each; 1 if every rank has them all.
    """
    chunk = chunk_tokens(config, model.config.vocab_size)
    if not 0 < chunk < config.batch_size_per_gpu * config.seq_length:
        return
    whole, decoder = model.forward, decoder_of(model)

    def compute_loss(
        hidden: torch.Tensor, labels: torch.Tensor, valid: torch.Tensor, kind: type
    ):
        # It uses the shifted labels; others only make it compute a loss.
        targets = {"labels": labels, "shift_labels": labels}
        hidden = hidden.contiguous()
        with decoder_returns(model, kind(last_hidden_state=hidden)):
            # Gemma 4 looks at the number of its inputs.
            loss = whole(**targets, num_items_in_batch=valid, inputs_embeds=hidden).loss
        return loss.full_tensor() if isinstance(loss, DTensor) else loss

    def forward(labels=None, num_items_in_batch=None, **inputs):
        if num_items_in_batch is None:
            return whole(labels=labels, **inputs)
        returned = decoder(**inputs)
        hidden = returned.last_hidden_state
        rows, positions = hidden.shape[:2]
        # As the head all-gathers them: a chunk has the same positions of every shard.
        labels = F.pad(labels[:, 1:], (0, 1), value=IGNORED)
        labels = labels.view(rows, sequence_shards, positions)
        width = max(chunk // (rows * sequence_shards), 1)
        parts = labels.split(width, dim=-1)
        targets = [part.flatten(1).contiguous() for part in parts]
        loss_of = partial(compute_loss, valid=num_items_in_batch, kind=type(returned))
        if torch.is_grad_enabled():
            inside = set(decoder.parameters())
            head = set(model.parameters()) - inside  # of all that follows the decoder
            head |= set(model.get_output_embeddings().parameters())  # tied, perhaps
            weights = [p for p in model.parameters() if p in head and p.requires_grad]
            loss = LossInChunks.apply(hidden, targets, width, loss_of, *weights)
        else:
            loss = sum(map(loss_of, hidden.split(width, dim=1), targets))
        return CausalLMOutputWithPast(loss=loss)

    model.forward = forward


@contextmanager
def decoder_returns(model: nn.Module, output: ModelOutput) -> Iterator[None]:
    """Call the model as if its decoder had returned this.

    Raises:
        PlanError: the model calls something else.
    """
    attributes, called = vars(decoder_of(model)), []
    own = attributes.get("forward")  # besides that of its class
    attributes["forward"] = lambda *_, **__: called.append(True) or output
    try:
        yield
    finally:
        del attributes["forward"]
        if own is not None:
            attributes["forward"] = own
    if not called:
        raise PlanError(
            "loss_chunk_tokens works only with models whose head works on their "
            f"decoder's output, which {type(model).__name__}'s does not; try 0"
        )


class LossInChunks(torch.autograd.Function):
    """The sum of the chunks' losses, each with its gradient before the next.

    So the logits of one chunk exist at a time, and none is computed twice.
    """

    @staticmethod
    def forward(
        ctx,
        hidden: torch.Tensor,
        targets: list[torch.Tensor],
        width: int,
        loss_of: Callable,
        *weights: nn.Parameter,
    ) -> torch.Tensor:
        total = torch.zeros((), device=hidden.device)
        of_hidden = torch.empty_like(hidden)
        of_weights = None
        chunks = zip(
            hidden.split(width, dim=1),
            of_hidden.split(width, dim=1),
            targets,
            strict=True,
        )
        for chunk, gradient, labels in chunks:
            chunk = chunk.detach().requires_grad_()
            with torch.enable_grad():
                loss = loss_of(chunk, labels)
            of_chunk, *parts = torch.autograd.grad(loss, (chunk, *weights))
            gradient.copy_(of_chunk)
            if of_weights is None:
                of_weights = [part.float() for part in parts]
            elif parts:  # none of a frozen head
                torch._foreach_add_(of_weights, parts)
            total += loss.detach()
        of_weights = [g.to(w.dtype) for g, w in zip(of_weights, weights, strict=True)]
        ctx.save_for_backward(of_hidden, *of_weights)
        return total

    @staticmethod
    def backward(ctx, scale: torch.Tensor) -> tuple:
        of_hidden, *of_weights = (g.mul_(scale) for g in ctx.saved_tensors)
        return of_hidden, None, None, None, *of_weights
