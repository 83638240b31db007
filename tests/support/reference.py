"""Training in one process: plain transformers and torch, nothing of this project."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from transformers import AutoModelForCausalLM

OPTIMIZERS = {
    "adamw": lambda p: torch.optim.AdamW(p, lr=1e-3, weight_decay=0.01),
    "sgd": lambda p: torch.optim.SGD(p, lr=0.5, weight_decay=0.01),
}


LOST = 1e-4  # of a parameter's largest gradient: below, rounding decides the sign


def summed(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    return F.cross_entropy(logits, labels, reduction="sum")


def train(
    model_dir: str,
    optimizer: str | Callable,
    steps: list,
    max_grad_norm: float,
    rng_state: torch.Tensor | None = None,
    loss_of: Callable = summed,
    trains: Callable = lambda name: True,
    after_step: Callable = lambda step, model: None,
    adapt: Callable = lambda model: None,
    dtype: torch.dtype = torch.float32,
):
    """Losses, gradient norms and final weights, on which rounding has little effect.

    AdamW moves a weight by its learning rate however small the gradient is, so the sign
    of one that is lost in rounding decides where it goes. ``settled``, an attribute of
    each weight, is False for the elements that ever had such a gradient.

    ``steps`` holds, for each optimizer step, a list of micro-batches, each a pair
    ``(input_ids, labels)`` of shape (rows, seq); the rows of all dp ranks are in it.
    ``trains`` says by its name whether a parameter does; ``adapt`` changes the model
    before that is trained; ``dtype`` is that of the weights, of their gradients and of
    the optimizer.
    """
    torch.set_num_threads(1)
    model = AutoModelForCausalLM.from_pretrained(model_dir, dtype=dtype).train()
    model.config.use_cache = False  # what training has no use for
    with torch.device("meta"):  # what a model freezes, from_pretrained does not
        own = dict(AutoModelForCausalLM.from_config(model.config).named_parameters())
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(own[name].requires_grad and trains(name))
    adapt(model)
    trained = {k: p for k, p in model.named_parameters() if p.requires_grad}
    update = OPTIMIZERS.get(optimizer, optimizer)(trained.values())
    losses, norms = [], []
    settled = {k: torch.ones_like(p).bool() for k, p in model.named_parameters()}
    if rng_state is not None:  # for models with dropout
        torch.set_rng_state(rng_state)
    for number, micro_batches in enumerate(steps, start=1):
        valid = sum((labels[:, 1:] != -100).sum() for _, labels in micro_batches)
        total = 0.0
        for input_ids, labels in micro_batches:
            # What follows the last label that counts may be padding.
            mask = (labels != -100).flip(1).cumsum(1).flip(1) > 0
            logits = model(input_ids, attention_mask=mask.long()).logits
            loss = loss_of(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
            (loss / valid).backward()
            total += loss.item() / valid.item()
        norm = torch.nn.utils.clip_grad_norm_([*trained.values()], max_grad_norm)
        for name, parameter in trained.items():
            if parameter.grad is None:  # no part of the loss
                continue
            size = parameter.grad.abs()
            settled[name] &= (size == 0) | (size > LOST * size.max())
        update.step()
        update.zero_grad()
        losses.append(total)
        norms.append(norm.item())
        after_step(number, model)
    weights = {name: p.detach() for name, p in model.named_parameters()}
    for name, weight in weights.items():
        weight.settled = settled[name] | isinstance(update, torch.optim.SGD)
    return losses, norms, weights
