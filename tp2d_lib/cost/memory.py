"""What a rank holds: bytes of weights, gradients, optimizer state, activations."""

from __future__ import annotations

from contextlib import ExitStack

import torch
from torch import nn
from torch.autograd.graph import saved_tensors_hooks
from torch.distributed.tensor import DTensor
from torch.nn.modules import module as every_module


def fsdp_rank_bytes(engine, batch: list[dict]) -> dict[str, int]:
    """Train one step of the PyTorch engine and measure what this rank holds.

    Returns:
        Bytes of ``parameters``, of ``gradients`` just before the update, and of the
        ``optimizer`` state after it.
    """
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


class Activations:
    """Bytes that autograd keeps from a model's forward for its backward.

    Use ``with Activations(model) as kept: step()``; ``kept.bytes`` is then that of the
    last micro-batch. It counts neither weights, gathered ones included, nor what
    backward itself needs in addition, such as a layer that it recomputes.
    """

    def __init__(self, model: nn.Module):
        self.model, self.bytes = model, 0
        # Storages are kept alive, so that no other reuses the address of one.
        self.saved: dict[int, torch.UntypedStorage] = {}
        self.weights: dict[int, torch.UntypedStorage] = {}

    def __enter__(self) -> Activations:
        self.stack = ExitStack()
        for handle in (
            every_module.register_module_forward_pre_hook(self.before),
            every_module.register_module_forward_hook(self.after),
        ):
            self.stack.callback(handle.remove)
        self.stack.enter_context(saved_tensors_hooks(self.save, lambda tensor: tensor))
        return self

    def __exit__(self, *_) -> None:
        self.stack.close()
        self.saved.clear()
        self.weights.clear()

    def save(self, tensor: torch.Tensor) -> torch.Tensor:
        storage = local([tensor])[0].untyped_storage()
        self.saved[storage._cdata] = storage
        return tensor

    def before(self, module: nn.Module, _) -> None:
        if module is self.model:
            self.saved.clear()

    def after(self, module: nn.Module, *_) -> None:
        for weight in local(module.parameters(recurse=False)):  # gathered at this point
            storage = weight.untyped_storage()
            self.weights[storage._cdata] = storage
        if module is self.model:
            kept = self.saved.keys() - self.weights.keys()
            self.bytes = sum(self.saved[key].nbytes() for key in kept)
            self.saved.clear()


def autotp_rank_bytes(engine, batch: list[dict]) -> dict[str, int]:
    """Train one step of the DeepSpeed engine and measure what this rank holds.

    Gradients are measured after the first micro-batch, while they accumulate, which is
    when stages 1 and 2 differ, so pass at least two. The optimizer state, made by the
    first update, is measured after the step.

    Returns:
        Bytes of ``parameters``, ``gradients`` and ``optimizer``.
    """
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
    """Bytes of tensors; one that is listed twice counts once."""
    return sum({id(t): t.nbytes for t in tensors if t is not None}.values())


def weights(engine) -> list[torch.Tensor]:
    """Stage 3 keeps a rank's partition beside an empty parameter, in ``ds_tensor``."""
    return [getattr(p, "ds_tensor", p) for p in engine.model.parameters()]


def gradients(engine) -> list[torch.Tensor]:
    parameters = list(engine.model.parameters())
    if engine.config.zero_stage == 3:
        from deepspeed.utils import safe_get_local_grad  # here: FSDP2 does not need it

        return [safe_get_local_grad(p) for p in parameters]
    found = [p.grad for p in parameters]
    # stage 1 in bfloat16, in addition to those
    found += getattr(engine.optimizer, "fp32_groups_gradients_flat", [])
    # stage 2 while it accumulates; stages 1 and 2 after the last reduction
    for name in ("all_grad_tensors", "averaged_gradients"):
        if all(gradient is None for gradient in found):
            shares = getattr(engine.optimizer, name, {}).values()
            found = [gradient for share in shares for gradient in share or []]
    return found


def optimizer_state(engine) -> list[torch.Tensor]:
    """Master weights, if there are any, and the optimizer's state for each of them."""
    inner = getattr(engine.optimizer, "optimizer", engine.optimizer)
    own = {id(p) for p in engine.model.parameters()}
    masters = [p for group in inner.param_groups for p in group["params"]]
    masters += getattr(engine.optimizer, "fp32_partitioned_groups_flat", [])  # stage 3
    state = [t for entry in inner.state.values() for t in entry.values()]
    return [t for t in (*masters, *state) if torch.is_tensor(t) and id(t) not in own]
