"""The notebooks' lessons that need no second rank, computed on the device."""

from __future__ import annotations

import hashlib

import torch
import torch.distributed as dist

from scripts.gpu.harness import Failed, Run, within
from tp2d_lib import model as models
from tp2d_lib.fsdp.plan import tensor_parallel_plan


def by_hand(run: Run) -> str:
    """Columns, then rows: the work of two tp ranks, one after the other, and a sum."""
    torch.manual_seed(0)
    X, A, B = torch.randn(3, 8), torch.randn(8, 12), torch.randn(12, 8)
    X, A, B = (matrix.to(run.device) for matrix in (X, A, B))
    full = torch.relu(X @ A) @ B
    halves = zip(A.chunk(2, dim=1), B.chunk(2, dim=0), strict=True)
    Z1, Z2 = (torch.relu(X @ columns) @ rows for columns, rows in halves)
    if (Z1 - full).abs().max() < 0.1:
        raise Failed("one rank's partial result is the whole one")
    return within(error=((Z1 + Z2 - full).abs().max().item(), 1e-5))


def rows_follow_dp_rank(run: Run) -> str:
    """Ranks of a TP group read the same rows, those of a DP group different ones."""
    tokens = run.batches(run.config(), 1)[0][0]["input_ids"]
    mine = (run.mesh["dp"].get_local_rank(), hashlib.sha256(tokens.numpy()).hexdigest())
    every = [mine] * dist.get_world_size()
    dist.all_gather_object(every, mine)
    shares = len({share for _, share in every})
    if not len(set(every)) == shares == run.dp_size:
        raise Failed(f"{shares} shares of the rows for dp_size {run.dp_size}")
    return f"{shares} share(s) of the rows"


def plan_covers_the_model(run: Run) -> str:
    """Every parameter of the demo model has a style; else the plan is refused."""
    plan = tensor_parallel_plan(models.build_empty_model(run.config()))
    return f"{len(plan)} entries cover every parameter"


def small_updates(run: Run) -> str:
    """Weights kept in bfloat16 lose most updates as small as AdamW's at 1e-5."""
    torch.manual_seed(0)
    weights = torch.randn(1_000_000) * 0.02
    update = 1e-5 * torch.randn(1_000_000).sign()
    stuck = {}
    for kind in (torch.float32, torch.bfloat16):
        old = weights.to(run.device, kind)
        moved = old + update.to(run.device, kind)
        stuck[kind] = (moved == old).float().mean().item()
    text = ", ".join(f"{str(k)[6:]} {share:.0%}" for k, share in stuck.items())
    if not stuck[torch.float32] < 0.01 < 0.5 < stuck[torch.bfloat16]:
        raise Failed(text)
    return f"did not move: {text}"
