"""One optimizer step of the DeepSpeed engine: the loss, its gradients, the update."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.distributed as dist

from tp2d_lib.autotp.layers import is_sharded
from tp2d_lib.data import valid_tokens
from tp2d_lib.model.attention import model_inputs

if TYPE_CHECKING:
    from tp2d_lib.autotp.engine import AutoTPEngine


def train_step(
    engine: AutoTPEngine, batch: list[dict[str, torch.Tensor]]
) -> tuple[torch.Tensor, torch.Tensor]:
    """One optimizer step over the micro-batches of a global batch.

    Returns the loss, a mean over the valid tokens of the global batch, and the gradient
    norm before clipping: 0-d tensors, the same on every rank.
    """
    dp_group, wrapped = engine.mesh.get_group("dp"), engine.wrapped
    valid = valid_tokens(batch).to(engine.device, non_blocking=True)
    dist.all_reduce(valid, group=dp_group)  # over the global batch
    valid.clamp_(min=1)  # none, perhaps, in rows that are not trained on
    total = torch.zeros((), device=engine.device)
    for micro in batch:
        loss = forward(engine, micro, valid)
        total += loss.detach()
        # DeepSpeed averages over dp and micro-batches; we need the sum.
        wrapped.backward(loss * engine.config.dp_size * len(batch))
        if wrapped.is_gradient_accumulation_boundary():
            engine.check_first_gradients()
            norm = plain_grad_norm(engine)
        wrapped.step()  # clips and updates after the last micro-batch
    engine.share = total.clone()  # to name this dp rank if it is not finite
    dist.all_reduce(total, group=dp_group)
    if norm is None:  # a number after an overflow, when DeepSpeed skips the update
        norm = torch.as_tensor(wrapped.get_global_grad_norm(), device=engine.device)
    return total, norm


def forward(
    engine: AutoTPEngine, micro: dict[str, torch.Tensor], valid: torch.Tensor
) -> torch.Tensor:
    """The summed loss of a micro-batch, divided by ``valid``, a number of tokens."""
    inputs = model_inputs(engine.model, micro, engine.device)
    return engine.wrapped(**inputs, use_cache=False, num_items_in_batch=valid).loss


def plain_grad_norm(engine: AutoTPEngine) -> torch.Tensor | None:
    """The norm at ZeRO 0 in float32, where DeepSpeed returns none; otherwise None."""
    if not isinstance(engine.optimizer, torch.optim.Optimizer):
        return None
    parts = torch.zeros(2, device=engine.device)  # of sharded, of replicated parameters
    for parameter in engine.model.parameters():
        if parameter.requires_grad:
            which = 0 if is_sharded(parameter) else 1
            parts[which] += parameter.grad.square().sum()
    dist.all_reduce(parts[0], group=engine.mesh.get_group("tp"))
    return parts.sum().sqrt()
