"""Checks of what a run writes: checkpoints, exports, traces."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor
from transformers import AutoModelForCausalLM

from scripts.gpu.harness import Failed, Run, within


def copied(engine) -> dict[str, torch.Tensor]:
    return {name: w.clone() for name, w in engine.local_weights().items()}


def equal(one: dict, other: dict) -> bool:
    return all(torch.equal(weight, other[name]) for name, weight in one.items())


def steps(engine, batches: list) -> list[tuple[float, float]]:
    return [tuple(map(float, engine.step(batch))) for batch in batches]


def resume(run: Run, engine: str = "fsdp") -> str:
    """Three steps, a checkpoint, three more; a new engine repeats the last three.

    The weights that it loads are those that were saved, bit for bit. So is all that
    follows, if algorithms are deterministic; if not, it is only told.
    """
    config = run.config()
    batches, folder = run.batches(config, 6), run.folder(f"resume-{engine}")
    first = run.build(config, engine)
    steps(first, batches[:3])
    first.save(folder)
    saved = copied(first)
    went_on = steps(first, batches[3:])
    second = run.build(config, engine)
    second.load(folder)
    if not equal(second.local_weights(), saved):
        raise Failed("the weights loaded are not those saved")
    repeated = steps(second, batches[3:])
    same = went_on == repeated and equal(copied(first), second.local_weights())
    if same:
        return "three further steps are equal, bit for bit"
    pairs = zip(repeated, went_on, strict=True)
    apart = max(abs(a - b) / b for (a, _), (b, _) in pairs)
    text = f"three further steps differ, losses by {apart:.1e}"
    if run.deterministic:
        raise Failed(text)
    return f"{text}; --deterministic was not set"


def async_checkpoint(run: Run) -> str:
    """What is written while training continues is what was there before."""
    config = run.config(async_checkpoint=True)
    batches, folder = run.batches(config, 4), run.folder("async")
    engine = run.build(config)
    steps(engine, batches[:2])
    saved = copied(engine)
    writing = engine.save(folder)
    steps(engine, batches[2:])
    writing.result()
    dist.barrier()
    moved = not equal(engine.local_weights(), saved)
    engine.load(folder)
    if not (moved and equal(engine.local_weights(), saved)):
        raise Failed("the weights loaded are not those at the time of the save")
    return "the weights at the time of the save, bit for bit"


@torch.no_grad()
def logits_of(model, tokens: torch.Tensor) -> torch.Tensor:
    """Logits in float32 on the CPU; a sharded model needs its positions."""
    positions = torch.arange(tokens.shape[1], device=tokens.device)[None]
    logits = model(tokens, position_ids=positions, use_cache=False).logits
    whole = logits.full_tensor() if isinstance(logits, DTensor) else logits
    return whole.float().cpu()


def export(run: Run) -> str:
    """Plain transformers loads an export, and computes the same logits with it."""
    config = run.config()
    engine, folder = run.build(config), run.folder("export")
    steps(engine, run.batches(config, 2))
    engine.export(folder)
    loaded = AutoModelForCausalLM.from_pretrained(folder).to(engine.device)
    tokens = run.batches(config, 1)[0][0]["input_ids"][:1].to(engine.device)
    ours, theirs = logits_of(engine.model, tokens), logits_of(loaded, tokens)
    return within(logits=((ours - theirs).abs().max().item(), 1e-4))
