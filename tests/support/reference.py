"""Training in one process: plain transformers and torch, nothing of this project."""

import torch
import torch.nn.functional as F
from transformers import AutoModelForCausalLM

OPTIMIZERS = {
    "adamw": lambda p: torch.optim.AdamW(p, lr=1e-3, weight_decay=0.01),
    "sgd": lambda p: torch.optim.SGD(p, lr=0.5, weight_decay=0.01),
}


LOST = 1e-4  # of a parameter's largest gradient: below, rounding decides the sign


def train(
    model_dir: str,
    optimizer: str,
    steps: list,
    max_grad_norm: float,
    rng_state: torch.Tensor | None = None,
):
    """Losses, gradient norms and final weights, on which rounding has little effect.

    AdamW moves a weight by its learning rate however small the gradient is, so the sign
    of one that is lost in rounding decides where it goes. ``settled``, an attribute of
    each weight, is False for the elements that ever had such a gradient.

    ``steps`` holds, for each optimizer step, a list of micro-batches, each a pair
    ``(input_ids, labels)`` of shape (rows, seq); the rows of all dp ranks are in it.
    """
    torch.set_num_threads(1)
    model = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32).train()
    update = OPTIMIZERS[optimizer](model.parameters())
    losses, norms = [], []
    settled = {k: torch.ones_like(p).bool() for k, p in model.named_parameters()}
    if rng_state is not None:  # for models with dropout
        torch.set_rng_state(rng_state)
    for micro_batches in steps:
        valid = sum((labels[:, 1:] != -100).sum() for _, labels in micro_batches)
        total = 0.0
        for input_ids, labels in micro_batches:
            # What follows the last label that counts may be padding.
            mask = (labels != -100).flip(1).cumsum(1).flip(1) > 0
            logits = model(input_ids, attention_mask=mask.long()).logits
            loss = F.cross_entropy(
                logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), reduction="sum"
            )
            (loss / valid).backward()
            total += loss.item() / valid.item()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), max_grad_norm)
        for name, parameter in model.named_parameters():
            size = parameter.grad.abs()
            settled[name] &= (size == 0) | (size > LOST * size.max())
        update.step()
        update.zero_grad()
        losses.append(total)
        norms.append(norm.item())
    weights = {name: p.detach() for name, p in model.named_parameters()}
    for name, weight in weights.items():
        weight.settled = settled[name] | (optimizer == "sgd")
    return losses, norms, weights
