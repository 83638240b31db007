"""What a rank holds: bytes of weights, gradients, optimizer state, activations."""

from __future__ import annotations

import weakref
from collections import Counter

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode  # no public name, as below
from torch.distributed.tensor import DTensor
from torch.nn.modules import module as every_module
from torch.optim.optimizer import register_optimizer_step_pre_hook
from torch.utils._python_dispatch import TorchDispatchMode

from tp2d_lib.cost.comm import is_wrapper, tensors


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


class LiveBytes(TorchDispatchMode):
    """Follow the bytes of all tensors that operators have made and that still exist.

    Enter it before the model is built, and assign ``model`` after that. ``most`` is the
    largest total of each phase: "forward", "backward" with clipping, and "update", from
    when the optimizer starts. ``activations`` is by how much the last forward
    raised the total: what autograd keeps, and weights that stay gathered. What an
    operator frees before it returns is not seen.

    Args:
        fake_mode: of the tensors to count, if these are not real, and already entered.
            DTensor enters it again, or another, for tensors of the full shape, with
            which it finds out what an operator returns; those are not counted.
    """

    def __init__(self, fake_mode: FakeTensorMode | None = None):
        super().__init__()
        self.fake_mode = fake_mode
        self.sizes: dict[int, int] = {}  # of storages, by their address
        self.total, self.activations, self.model = 0, 0, None
        self.phase, self.most = "build", Counter()

    def __enter__(self) -> LiveBytes:
        self.hooks = [
            every_module.register_module_forward_pre_hook(self.before_forward),
            every_module.register_module_forward_hook(self.after_forward),
            register_optimizer_step_pre_hook(self.before_update),
        ]
        self.resize = resize = torch.UntypedStorage.resize_

        def resize_and_count(storage, size):  # how FSDP2 frees what it has gathered
            resize(storage, size)
            if storage._cdata in self.sizes:
                self.count(storage)

        torch.UntypedStorage.resize_ = resize_and_count
        return super().__enter__()

    def __exit__(self, *error) -> None:
        super().__exit__(*error)
        torch.UntypedStorage.resize_ = self.resize
        for hook in self.hooks:
            hook.remove()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if any(map(is_wrapper, types)):
            return NotImplemented  # called again with what the wrapper holds
        out = func(*args, **(kwargs or {}))
        if func is torch.ops._c10d_functional.wait_tensor.default:
            return args[0]  # as a real one does; a fake one makes a new tensor
        if self.fake_mode is None or len(self.fake_mode.enter_stack) == 1:
            for value in tensors(out):
                own = getattr(value, "fake_mode", None) is self.fake_mode
                empty = value.device.type == "meta" or is_wrapper(type(value))
                if own and not empty:
                    self.count(value.untyped_storage())
        return out

    def count(self, storage: torch.UntypedStorage) -> None:
        if storage._cdata not in self.sizes:
            self.sizes[storage._cdata] = 0
            weakref.finalize(storage, self.freed, storage._cdata)
        self.total += storage.nbytes() - self.sizes[storage._cdata]
        self.sizes[storage._cdata] = storage.nbytes()
        self.most[self.phase] = max(self.most[self.phase], self.total)

    def freed(self, address: int) -> None:
        self.total -= self.sizes.pop(address)

    def before_forward(self, module: nn.Module, _) -> None:
        if module is self.model:
            self.phase, self.start = "forward", self.total

    def after_forward(self, module: nn.Module, *_) -> None:
        if module is self.model:
            self.phase, self.activations = "backward", self.total - self.start

    def before_update(self, *_) -> None:
        self.phase = "update"


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
