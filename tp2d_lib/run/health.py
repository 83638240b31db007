"""Is the run still sound? Finite numbers, equal replicas; checked at every log."""

from __future__ import annotations

import torch
import torch.distributed as dist

from tp2d_lib.model.guards import NonFiniteError, is_finite

MAX_SKIPPED = 20  # steps in a row; DeepSpeed's loss scaling needs about 16 to settle
DRIFT = 1e-3  # relative; rounding differs where dp groups reduce in different orders


class DriftError(RuntimeError):
    """Ranks hold different values of what must be equal."""


def describe_step(step: int, loss: float, norm: float, share, rows, mesh) -> str:
    """A step whose numbers are not finite, with rank and rows; every rank must call it.

    Args:
        share: this dp rank's part of the loss.
        rows: the numbers of the rows that this dp rank read.
    """
    own = None if share.isfinite() else (mesh["dp"].get_local_rank(), rows.tolist())
    answers = [None] * dist.get_world_size()
    dist.all_gather_object(answers, own)
    found = sorted({str(answer): answer for answer in answers if answer}.values())
    where = "".join(f"; dp rank {rank} read rows {rows}" for rank, rows in found)
    return f"step {step} has loss {loss:g} and gradient norm {norm:g}{where}"


@torch.no_grad()
def check_weights(engine, step: int) -> None:
    """No weight is infinite or NaN; every rank must call it.

    Raises:
        NonFiniteError: names the step, so that it is never saved.
    """
    weights = engine.local_weights().values()
    finite = torch.stack([is_finite(weight) for weight in weights]).all().int()
    dist.all_reduce(finite, dist.ReduceOp.MIN)
    if not finite:
        raise NonFiniteError(
            f"the weights must be finite to be saved, but are not after step {step}; "
            "try a lower learning_rate"
        )


@torch.no_grad()
def check_replicas(engine, step: int) -> None:
    """Ranks hold equal copies; every rank must call it.

    Copies on dp ranks were gathered from one owner, or updated with one all-reduced
    gradient, so their bits are compared; copies on tp ranks were each updated with a
    sum of their own over dp, so their sums are, to rounding.

    Raises:
        DriftError: names the parameter with the largest difference.
    """
    drifted = [differing(mesh, weights) for mesh, weights in engine.replicas()]
    found = torch.tensor(any(drifted), device=engine.device, dtype=torch.int32)
    dist.all_reduce(found, dist.ReduceOp.MAX)
    if found:  # all ranks stop together
        answers = [None] * dist.get_world_size()
        dist.all_gather_object(answers, next(filter(None, drifted), None))
        raise DriftError(
            f"{next(filter(None, answers))}, but differs after step {step}: their "
            "copies have drifted apart; resume from the last checkpoint, on other "
            "hardware if it comes again"
        )


def differing(mesh, weights: dict[str, torch.Tensor]) -> str | None:
    """The weight that differs most between the ranks of a 1D mesh, as a rule."""
    if not weights or mesh.size() == 1:
        return None
    (axis,), allowed = mesh.mesh_dim_names, 0
    if axis == "tp":
        values = [weight.double().sum() for weight in weights.values()]
        scales = [weight.double().abs().sum() for weight in weights.values()]
        allowed = DRIFT * torch.stack(scales)
    else:
        values = [bit_sum(weight) for weight in weights.values()]
    low = torch.stack(values)
    high = low.clone()
    dist.all_reduce(low, dist.ReduceOp.MIN, group=mesh.get_group())
    dist.all_reduce(high, dist.ReduceOp.MAX, group=mesh.get_group())
    apart = high - low - allowed
    if not (apart > 0).any():
        return None
    name = list(weights)[int(apart.argmax())]
    return f"{name!r} must be equal on all {axis} ranks"


def bit_sum(weight: torch.Tensor) -> torch.Tensor:
    """The sum of a tensor's bits, read as integers: differs if any bit does."""
    kind = {2: torch.int16, 4: torch.int32}[weight.element_size()]
    return weight.contiguous().view(kind).sum(dtype=torch.int64)
