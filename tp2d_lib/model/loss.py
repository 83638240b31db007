"""Label smoothing and z-loss, also where the vocabulary is sharded over tp.

Neither PyTorch's loss_parallel nor DeepSpeed's loss for a sharded vocabulary has them.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.distributed.tensor import DTensor

from tp2d_lib.config import TrainConfig
from tp2d_lib.model.attention import IGNORED


def regularize(model: nn.Module, config: TrainConfig, group: dist.ProcessGroup) -> None:
    """Give the model a loss with label smoothing and z-loss, if there are any.

    A validation loss stays the plain one: the model computes it in its ``eval`` mode.
    """
    if not (config.label_smoothing_factor or config.z_loss):
        return
    plain = model.loss_function
    vocabulary = model.config.vocab_size

    def loss_of(
        logits,
        labels,
        vocab_size=None,
        num_items_in_batch=None,
        shift_labels=None,
        **more,
    ):
        if not model.training:
            more |= {"num_items_in_batch": num_items_in_batch}
            return plain(logits, labels, vocab_size, shift_labels=shift_labels, **more)
        if shift_labels is None:
            shift_labels = F.pad(labels[..., 1:], (0, 1), value=IGNORED)
        first = getattr(plain, "vocab_start_index", 0)  # DeepSpeed's
        if isinstance(logits, DTensor):
            first = group.rank() * -(-vocabulary // group.size())
            logits = logits.to_local()
        sharded = group if logits.shape[-1] < vocabulary else None
        loss = RegularizedLoss.apply(
            logits.flatten(0, -2).float(),
            shift_labels.flatten(),
            first,
            vocabulary,
            sharded,
            config.label_smoothing_factor,
            config.z_loss,
        )
        return loss / num_items_in_batch

    model.loss_function = loss_of


class RegularizedLoss(torch.autograd.Function):
    """The sum over the tokens that count of

        lse - (1 - s) * x[label] - s * mean(x) + z * lse ** 2

    where ``x`` are a token's logits, ``lse`` their logsumexp, ``s`` the smoothing: the
    ``label_smoothing`` of torch's cross_entropy, and z-loss as in PaLM (Chowdhery et
    al., 2022), section 5.

    Args:
        logits: (tokens, local vocabulary) float32.
        labels: (tokens,), -100 where a token does not count.
        first: token id of the first local logit.
        vocabulary: logits of a token on all ranks together.
        group: the ranks that the vocabulary is sharded over; None if it is not.
    """

    @staticmethod
    def forward(ctx, logits, labels, first, vocabulary, group, smoothing, z_loss):
        def over_ranks(values, operator=dist.ReduceOp.SUM):
            if group is not None:
                dist.all_reduce(values, operator, group=group)
            return values

        counts = labels != IGNORED
        highest = over_ranks(logits.amax(-1), dist.ReduceOp.MAX)
        softmax = (logits - highest[:, None]).exp_()
        total = over_ranks(softmax.sum(-1))
        softmax /= total[:, None]
        lse = total.log() + highest
        local = labels - first
        here = counts & (local >= 0) & (local < logits.shape[-1])
        local = local.masked_fill(~here, 0)[:, None]
        of_label = logits.gather(-1, local).squeeze(-1).masked_fill(~here, 0)
        parts = over_ranks(torch.stack([of_label, logits.sum(-1)]))
        each = lse - (1 - smoothing) * parts[0] - smoothing / vocabulary * parts[1]
        each += z_loss * lse.square()
        ctx.save_for_backward(softmax, lse, local, here, counts)
        ctx.smoothing, ctx.vocabulary, ctx.z_loss = smoothing, vocabulary, z_loss
        return each.masked_fill(~counts, 0).sum()

    @staticmethod
    def backward(ctx, gradient):
        softmax, lse, local, here, counts = ctx.saved_tensors
        of_logits = softmax * (1 + 2 * ctx.z_loss * lse)[:, None]
        of_logits -= ctx.smoothing / ctx.vocabulary
        of_label = here.to(of_logits.dtype)[:, None] * (ctx.smoothing - 1)
        of_logits.scatter_add_(-1, local, of_label)
        of_logits *= (counts * gradient)[:, None]
        return of_logits, *[None] * 6
