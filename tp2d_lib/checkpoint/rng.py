"""The random generators of one rank: saved in a checkpoint, restored on resume."""

from __future__ import annotations

import torch


def states(device: torch.device) -> dict[str, torch.Tensor]:
    """State of each generator that a rank uses, by device type."""
    found = {"cpu": torch.get_rng_state()}
    if device.type == "cuda":
        found["cuda"] = torch.cuda.get_rng_state()
    return found


def restore(saved: dict[str, torch.Tensor]) -> None:
    for kind, state in saved.items():
        module = torch.cuda if kind == "cuda" else torch
        module.set_rng_state(state)
