"""What a rank holds: bytes of weights, gradients and optimizer state."""

from __future__ import annotations

import torch
from deepspeed.utils import safe_get_local_grad
from torch.distributed.tensor import DTensor


def fsdp_rank_bytes(engine, batch: list[dict]) -> dict[str, int]:
    """The same three for the PyTorch engine; gradients are taken before the update."""
    held = {"parameters": total(local(engine.model.parameters()))}
    hook = engine.optimizer.register_step_pre_hook(
        lambda *_: held.update(
            gradients=total(local(p.grad for p in engine.model.parameters()))
        )
    )
    engine.step(batch)
    hook.remove()
    state = engine.optimizer.state.values()
    held["optimizer"] = total(local(t for entry in state for t in entry.values()))
    return held


def local(values) -> list[torch.Tensor]:
    return [v.to_local() if isinstance(v, DTensor) else v for v in values]


def rank_bytes(engine, batch: list[dict]) -> dict[str, int]:
    """Train one step and measure what this rank holds while it accumulates gradients.

    Taken after the first micro-batch, when stages 1 and 2 differ: give at least two.
    The optimizer's state, made by the first update, is taken after the step. In float32
    only: in half precision DeepSpeed keeps gradients in more than one place.
    """
    assert not engine.wrapped.bfloat16_enabled()
    assert not engine.wrapped.fp16_enabled()
    held = {"parameters": total(weights(engine))}
    update = engine.wrapped.step

    def measure_and_update():
        held.setdefault("gradients", total(gradients(engine)))
        update()

    engine.wrapped.step = measure_and_update
    engine.step(batch)
    engine.wrapped.step = update
    held["optimizer"] = total(optimizer_state(engine))
    return held


def total(tensors: list[torch.Tensor]) -> int:
    """Bytes of tensors, one that is listed twice counted once."""
    return sum({id(t): t.nbytes for t in tensors if t is not None}.values())


def weights(engine) -> list[torch.Tensor]:
    """Stage 3 keeps a rank's share beside an empty parameter, in ``ds_tensor``."""
    return [getattr(p, "ds_tensor", p) for p in engine.model.parameters()]


def gradients(engine) -> list[torch.Tensor]:
    parameters = list(engine.model.parameters())
    if engine.config.zero_stage == 3:
        return [safe_get_local_grad(p) for p in parameters]
    shares = getattr(engine.optimizer, "all_grad_tensors", {})  # of stage 2
    return [p.grad for p in parameters] + [g for s in shares.values() for g in s or []]


def optimizer_state(engine) -> list[torch.Tensor]:
    """Masters, where there are any, and what the optimizer keeps for each of them."""
    inner = getattr(engine.optimizer, "optimizer", engine.optimizer)
    own = {id(p) for p in engine.model.parameters()}
    masters = [p for group in inner.param_groups for p in group["params"]]
    masters += getattr(engine.optimizer, "fp32_partitioned_groups_flat", [])  # stage 3
    state = [t for entry in inner.state.values() for t in entry.values()]
    return [t for t in (*masters, *state) if torch.is_tensor(t) and id(t) not in own]
