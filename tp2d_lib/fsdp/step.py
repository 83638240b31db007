"""One optimizer step of the PyTorch engine: the loss, its gradients, the update."""

from __future__ import annotations

from contextlib import nullcontext
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import loss_parallel

from tp2d_lib.data import valid_tokens
from tp2d_lib.fsdp.optimizer import global_grad_norm
from tp2d_lib.model.attention import model_inputs

if TYPE_CHECKING:
    from tp2d_lib.fsdp.engine import FSDPEngine


def train_step(
    engine: FSDPEngine, batch: list[dict[str, torch.Tensor]]
) -> tuple[torch.Tensor, torch.Tensor]:
    """One optimizer step over the micro-batches of a global batch.

    Returns the loss, a mean over the valid tokens of the global batch, and the gradient
    norm before clipping: 0-d tensors, the same on every rank.
    """
    dp_group = engine.mesh.get_group("dp")
    valid = valid_tokens(batch).to(engine.device, non_blocking=True)
    dist.all_reduce(valid, group=dp_group)  # over the global batch
    valid.clamp_(min=1)  # none, perhaps, in rows that are not trained on
    loss = torch.zeros((), device=engine.device)
    for micro in batch:
        loss += forward_backward(engine, micro, valid)
    engine.share = loss.clone()  # to name this dp rank if it is not finite
    dist.all_reduce(loss, group=dp_group)
    engine.check_first_gradients()
    grad_norm = global_grad_norm(engine.model)
    nn.utils.clip_grads_with_norm_(
        engine.model.parameters(), engine.config.max_grad_norm, grad_norm
    )
    if engine.config.nonfinite == "stop" or grad_norm.isfinite():
        engine.optimizer.step()
    engine.optimizer.zero_grad()
    return loss, grad_norm


def forward_backward(
    engine: FSDPEngine, micro: dict[str, torch.Tensor], valid: torch.Tensor
) -> torch.Tensor:
    """Accumulate a micro-batch's gradient; returns this dp rank's share of the loss."""
    tp_size, dp_size = engine.config.tp_size, engine.config.dp_size
    with loss_parallel() if tp_size > 1 else nullcontext():  # logits stay sharded
        loss = forward(engine, micro, valid)
        (loss * dp_size).backward()  # FSDP averages over dp; we need the sum
    loss = loss.detach()
    return loss.full_tensor() if isinstance(loss, DTensor) else loss


def forward(
    engine: FSDPEngine, micro: dict[str, torch.Tensor], valid: torch.Tensor
) -> torch.Tensor:
    """The summed loss of a micro-batch, divided by ``valid``, a number of tokens."""
    inputs = model_inputs(engine.model, micro, engine.device)
    if engine.config.tp_size > 1:  # a rank that holds seq / tp positions infers others
        whole = torch.arange(micro["input_ids"].shape[1], device=engine.device)[None]
        inputs.setdefault("position_ids", whole)
    return engine.model(**inputs, use_cache=False, num_items_in_batch=valid).loss
