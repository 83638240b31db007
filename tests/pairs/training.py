"""One case: what every rank does, and the same in one process with transformers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from importlib import import_module
from itertools import islice
from pathlib import Path

import torch
import torch.nn.functional as F
from transformers import AutoModelForCausalLM

from tests.support import lora, reference
from tests.support.parity import the_mesh
from tp2d_lib import data
from tp2d_lib.fsdp import plan
from tp2d_lib.model.optimizer import build_optimizer
from tp2d_lib.run import evaluate

SCALE = 2.0  # of adapters, where lora_alpha is left out
STEPS = 3  # two before the checkpoint, and one after it
FROZEN = {"nothing": "(nothing)", "embedding": "embed_tokens", "layer": ".layers.0."}


def freeze(model, config, *, frozen: str, **options):
    """Leave a part of the model as it is, as a recipe of docs/recipes.md does."""
    for name, parameter in model.named_parameters():
        if FROZEN[frozen] in name:
            parameter.requires_grad_(False)
    return build_optimizer(model, config, **options)


def run(engine: str, config, case: dict, folder: str) -> dict | str:
    """Run by every rank: train, evaluate, save; load into a new engine, go on, export.

    Returns:
        Losses and norms, the validation loss, and what differs after the checkpoint was
        loaded; or the error, if there is one.
    """
    from tp2d_lib.model.attention import check_apart
    from tp2d_lib.run import health

    plan.SMALLEST_GROUP = case.get("smallest_group", 1)
    mesh = the_mesh(config.dp_size, config.tp_size)
    build = partial(
        import_module(f"tp2d_lib.{engine}").build_engine,
        config,
        mesh,
        build_optimizer=partial(freeze, frozen=case["frozen"]),
    )
    built, found = build(), {}
    if config.pack == "documents":
        check_apart(built, config)
    *batches, last = islice(data.build_dataloader(config, mesh), STEPS)
    found["steps"] = [figures(built, batch) for batch in batches]
    if config.eval_every:
        found["held_out"] = evaluate.evaluate(built, config)
    health.check_weights(built, STEPS - 1)
    health.check_replicas(built, STEPS - 1)
    writing = built.save(f"{folder}/checkpoint")
    found["steps"].append(figures(built, last))  # while an asynchronous one is written
    if writing:
        writing.result()
    fresh = build()
    fresh.load(f"{folder}/checkpoint")
    again = figures(fresh, last)
    found["resumed"] = differences(built, fresh)
    if again != found["steps"][-1]:
        found["resumed"].append(f"{again} instead of {found['steps'][-1]}")
    fresh.export(f"{folder}/export")
    return found


def figures(engine, batch: list) -> tuple[float, float]:
    loss, norm = engine.step(batch)
    return float(loss), float(norm)


def differences(one, other) -> list[str]:
    """Names of the weights of which not all bits are equal."""
    left, right = one.local_weights(), other.local_weights()
    return [
        name for name, weight in left.items() if not torch.equal(weight, right[name])
    ]


def expected(config, frozen: str) -> tuple[list, list, dict, float | None]:
    """Losses, norms, weights and the validation loss of one process."""
    one = replace(
        config,
        dp_size=1,
        dp_replicate_size=1,
        tp_size=1,
        num_workers=None,
        batch_size_per_gpu=config.dp_size * config.batch_size_per_gpu,
    )
    held_out = []

    def after_step(step: int, model) -> None:
        if config.eval_every and step == STEPS - 1:
            held_out.append(validation_loss(model, one))

    batches = islice(data.BatchLoader(one, Path(config.prepared_data), 0), STEPS)
    losses, norms, weights = reference.train(
        config.model_name,
        optimizer_of(config),
        [[pair for micro in batch for pair in documents(micro)] for batch in batches],
        config.max_grad_norm,
        loss_of=summed,
        trains=lambda name: FROZEN[frozen] not in name,
        after_step=after_step,
        adapt=partial(adapt, config=config, frozen=frozen),
        # Masters in bfloat16 lose updates that are small beside a weight.
        dtype=torch.float32,
    )
    if config.lora_rank:
        weights = merged(weights)
    return losses, norms, weights, next(iter(held_out), None)


def adapt(model, config, frozen: str) -> None:
    """Add adapters, of which those of a frozen layer are frozen too."""
    if config.lora_rank:
        lora.add(model, lora.linear_layers(model), config.lora_rank, SCALE)
        freeze(model, config, frozen=frozen)


def merged(weights: dict) -> dict:
    """With adapters added; where rounding decides about one, that says nothing."""
    found = lora.merged(weights, SCALE)
    for name, weight in found.items():
        weight.settled = getattr(weights[name], "settled", torch.ones_like(weight) > 0)
    return found


def documents(micro: dict) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """The documents of a micro-batch one by one: ids and labels, (1, length) each."""
    found = []
    for row, (ids, labels) in enumerate(
        zip(micro["input_ids"], micro["labels"], strict=True)
    ):
        starts = torch.zeros(1, dtype=torch.int64)
        if "position_ids" in micro:
            starts = (micro["position_ids"][row] == 0).nonzero().flatten()
        ends = [*starts[1:].tolist(), len(ids)]
        for start, end in zip(starts.tolist(), ends, strict=True):
            place = slice(start, end)
            if (labels[place][1:] != -100).any():
                found.append((ids[None, place], labels[None, place]))
    return found


def summed(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """The summed loss of logits (tokens, vocabulary) and their labels."""
    return F.cross_entropy(logits.float(), labels, reduction="sum")


def optimizer_of(config) -> Callable:
    """The optimizer of torch, with decay for all parameters or for matrices alone."""

    def build(parameters):
        every = list(parameters)
        flat = [p for p in every if p.ndim < 2 and config.decay == "matrices"]
        rest = [p for p in every if not any(p is other for other in flat)]
        kind = {"adamw": torch.optim.AdamW, "sgd": torch.optim.SGD}[config.optimizer]
        groups = [{"params": rest, "weight_decay": config.weight_decay}]
        groups += [{"params": flat, "weight_decay": 0.0}] if flat else []
        return kind(groups, lr=config.learning_rate)

    return build


@torch.no_grad()
def validation_loss(model, config) -> float:
    """The mean over the held-out tokens, document by document."""
    total, count = 0.0, 0
    for micro in evaluate.batches(config, 0):
        for ids, labels in documents(micro):
            logits = model(ids).logits[0, :-1].float()
            targets = labels[0, 1:]
            total += F.cross_entropy(logits, targets, reduction="sum").item()
            count += int((targets != -100).sum())
    return total / count


def exported(folder: str) -> dict[str, torch.Tensor]:
    return dict(AutoModelForCausalLM.from_pretrained(folder).named_parameters())
