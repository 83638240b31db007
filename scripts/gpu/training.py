"""Checks of the training itself: against a plain loop on the CPU, and its options."""

from __future__ import annotations

import itertools
import warnings
from functools import cache
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn
from torch._dynamo.utils import counters
from transformers import AutoModelForCausalLM

from scripts.gpu.harness import Failed, Run, Skipped, within
from tp2d_lib.config import ConfigError, TrainConfig
from tp2d_lib.cost import memory
from tp2d_lib.data import BatchLoader, valid_tokens
from tp2d_lib.model import guards

STEPS = 5
NAMES = ("input_ids", "labels")
RATES = {"adamw": 1e-3, "sgd": 0.5}
LOSS, NORM = 1e-4, 1e-3  # allowed relative errors in float32
# Of the weights, relative to how far training moved them. AdamW moves a weight as far
# however small its gradient is, also where rounding decides the sign.
WEIGHTS = {"adamw": 1e-2, "sgd": 1e-3}
HALF_LOSS, HALF_NORM = 5e-3, 5e-2  # in bfloat16, against float32


def read_weights(folder: str | Path) -> dict[str, torch.Tensor]:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    return {name: weight.detach() for name, weight in model.named_parameters()}


@cache
def train_plain(config: TrainConfig) -> tuple[list, list, dict]:
    """Losses, gradient norms and weights of plain transformers, on the CPU."""
    model = AutoModelForCausalLM.from_pretrained(config.model_name, dtype=torch.float32)
    kind = torch.optim.SGD if config.optimizer == "sgd" else torch.optim.AdamW
    update = kind(
        model.parameters(), lr=config.learning_rate, weight_decay=config.weight_decay
    )
    loader = BatchLoader(config, Path(config.prepared_data), dp_rank=0)
    losses, norms = [], []
    for (micro,) in itertools.islice(loader, STEPS):
        loss = one_by_one(model.train(), micro)
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), config.max_grad_norm)
        update.step()
        update.zero_grad()
        losses.append(loss.item())
        norms.append(norm.item())
    return losses, norms, {name: p.detach() for name, p in model.named_parameters()}


def one_by_one(model: nn.Module, micro: dict[str, torch.Tensor]) -> torch.Tensor:
    """The mean loss of a token, each document of a row computed by itself."""
    total = torch.zeros(())
    whole = torch.arange(micro["input_ids"].shape[1]).expand_as(micro["input_ids"])
    positions = micro.get("position_ids", whole)
    for ids, labels, row in zip(*map(micro.get, NAMES), positions, strict=True):
        lengths = (row == 0).nonzero().flatten()[1:].tolist()
        parts = (each.tensor_split(lengths) for each in (ids, labels))
        for document, targets in zip(*parts, strict=True):
            logits = model(document[None], use_cache=False).logits[0, :-1]
            total += F.cross_entropy(logits, targets[1:], reduction="sum")
    return total / valid_tokens([micro])


def expected(config: TrainConfig) -> tuple[list, list, dict]:
    """What one process computes for the same global batches."""
    whole = {"batch_size_per_gpu": config.global_batch_size, "dp_size": 1, "tp_size": 1}
    wanted = TrainConfig(
        model_name=config.model_name,
        prepared_data=config.prepared_data,
        seq_length=config.seq_length,
        optimizer=config.optimizer,
        learning_rate=config.learning_rate,
        pack=config.pack,
        device="cpu",
        **whole,
    )
    return train_plain(wanted)


def train(run: Run, config: TrainConfig, engine: str = "fsdp"):
    """A new engine, and the losses and gradient norms of its first steps."""
    built = run.build(config, engine)
    steps = [tuple(map(float, built.step(b))) for b in run.batches(config, STEPS)]
    return built, *zip(*steps, strict=True)


def largest(got, wanted) -> float:
    """The largest relative error; NaN if there is one."""
    got, wanted = torch.tensor(got), torch.tensor(wanted)
    return ((got - wanted).abs() / wanted).max().item()


def parity(run: Run, optimizer: str, engine: str = "fsdp", **settings) -> str:
    """Losses, gradient norms and exported weights equal those of a plain loop."""
    config = run.config(optimizer=optimizer, learning_rate=RATES[optimizer], **settings)
    losses, norms, weights = expected(config)
    built, got_losses, got_norms = train(run, config, engine)
    folder = run.folder(f"parity-{engine}-{optimizer}-{config.zero_stage}")
    built.export(folder)
    got, start = read_weights(folder), read_weights(config.model_name)
    apart = sum((got[name] - w).square().sum() for name, w in weights.items())
    moved = sum((start[name] - w).square().sum() for name, w in weights.items())
    return within(
        losses=(largest(got_losses, losses), LOSS),
        norms=(largest(got_norms, norms), NORM),
        weights=((apart / moved).sqrt().item(), WEIGHTS[optimizer]),
    )


def bfloat16(run: Run, engine: str = "fsdp", **settings) -> str:
    """The losses in bfloat16 are close to those of float32, but not the same."""
    need_bfloat16(run)
    config = run.config(**({"dtype": "bfloat16"} | settings))
    losses, norms, _ = expected(config)
    _, got_losses, got_norms = train(run, config, engine)
    if list(got_losses) == losses:
        raise Failed("the losses are those of float32: nothing was rounded")
    return within(
        losses=(largest(got_losses, losses), HALF_LOSS),
        norms=(largest(got_norms, norms), HALF_NORM),
    )


def documents(run: Run, engine: str = "fsdp", attention: str | None = None) -> str:
    """Documents in one row train as they would one by one."""
    own = {"pack": "documents", "attn_implementation": attention}
    own["prepared_data"] = str(run.place / "rows-128-documents")
    if attention and run.device == "cpu":
        raise Skipped(f"{attention} has no backward on a CPU")
    exact = parity(run, "adamw", engine, **own)
    return f"float32: {exact}; bfloat16: {bfloat16(run, engine, **own)}"


def waits(run: Run, engine: str = "fsdp") -> str:
    """In how many places the host waits for the GPU in a step."""
    if run.device == "cpu":
        raise Skipped("a CPU waits for nothing")
    config = run.config(
        pack="documents", prepared_data=str(run.place / "rows-128-documents")
    )
    built, batches = run.build(config, engine), run.batches(config, 4)
    for batch in batches[:-1]:
        built.step(batch)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        built.step(batches[-1])
        torch.cuda.set_sync_debug_mode("default")
    told = [w for w in told if "synchronizing CUDA operation" in str(w.message)]
    places = {f"{Path(w.filename).name}:{w.lineno}" for w in told}
    text = f"{len(told)} in a step {' '.join(sorted(places))}".strip()
    if told and engine == "fsdp":
        raise Failed(text)
    return text


def need_bfloat16(run: Run) -> None:
    if run.device == "cuda" and not torch.cuda.is_bf16_supported(
        including_emulation=False
    ):
        raise Skipped("this GPU has no native bfloat16")


def autocast(run: Run) -> str:
    return bfloat16(run, dtype="auto", autocast=True)


def compiled(run: Run) -> str:
    """Compiled blocks compute what plain ones do."""
    config = run.config(compile=True)
    try:
        guards.check_compiler(config)
    except ConfigError as error:
        raise Skipped(str(error)) from error
    torch._dynamo.reset()  # else the shapes of the mesh before would count as dynamic
    before = counters["stats"]["unique_graphs"]
    _, losses, norms = train(run, config)
    graphs = counters["stats"]["unique_graphs"] - before
    if not graphs:
        raise Failed("no graph was compiled")
    wanted = expected(config)
    errors = within(
        losses=(largest(losses, wanted[0]), LOSS),
        norms=(largest(norms, wanted[1]), NORM),
    )
    return f"{errors}, {graphs} graphs"


def activation_checkpointing(run: Run) -> str:
    """Recomputing gives the same steps, and keeps fewer bytes for backward."""
    kept, steps = [], []
    for recompute in ("none", "selective", "full"):
        config = run.config(activation_checkpointing=recompute)
        engine, losses, norms = train(run, config)
        steps.append((losses, norms))
        with memory.LiveBytes() as live:
            live.model = engine.model
            for batch in run.batches(config, 2):  # the first meets what existed before
                engine.step(batch)
        kept.append(live.activations)
    errors = within(
        losses=(max(largest(again[0], steps[0][0]) for again in steps[1:]), LOSS),
        norms=(max(largest(again[1], steps[0][1]) for again in steps[1:]), NORM),
    )
    shares = " and ".join(f"{each / kept[0]:.0%}" for each in kept[1:])
    text = f"{errors}, {shares} of the bytes for backward"
    if not kept[2] < kept[1] < kept[0]:
        raise Failed(text)
    return text


def learns(run: Run) -> str:
    """After twenty steps the model is better than one that only guesses."""
    config = run.config(learning_rate=4e-3)
    engine = run.build(config)
    losses = [float(engine.step(b)[0]) for b in run.batches(config, 20)]
    guess = torch.tensor(engine.model.config.vocab_size).log().item()
    text = f"loss {losses[0]:.3f} -> {losses[-1]:.3f}, a guess {guess:.3f}"
    if not losses[-1] < guess - 0.1:
        raise Failed(text)
    return text


def adapters(run: Run) -> str:
    """LoRA learns, and the merged export has the loss of the mesh with adapters."""
    config = run.config(lora_rank=4, learning_rate=4e-3, merge_adapter=True)
    engine, (*batches, last) = run.build(config), run.batches(config, 21)
    losses = [float(engine.step(batch)[0]) for batch in batches]
    folder = run.folder("merged")
    engine.export(folder)
    merged = run.build(run.config(model_name=str(folder)))
    with_adapters, whole = (float(one.step(last)[0]) for one in (engine, merged))
    errors = within(losses=(largest([whole], [with_adapters]), LOSS))
    text = f"{errors}, loss {losses[0]:.3f} -> {losses[-1]:.3f}"
    if not losses[-1] < losses[0] - 0.1:
        raise Failed(text)
    return text
