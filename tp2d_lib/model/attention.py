"""Causal attention: without a mask where it says no more, and within documents."""

from __future__ import annotations

import inspect

import torch
from torch import nn
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from tp2d_lib.config import ConfigError, TrainConfig
from tp2d_lib.model.guards import PlanError, sliding_window

CAUSAL = "tp2d_causal"  # sdpa, for which transformers makes no masks
KINDS = {"full_attention", "sliding_attention"}
IGNORED = -100  # label of a position that does not count, as in torch and transformers


def needs_no_mask(model: nn.Module, config: TrainConfig) -> bool:
    """Whether attention is causal and no more: a mask would say nothing else."""
    hf = model.config
    window = sliding_window(hf) or config.seq_length
    known = hf._attn_implementation in ("sdpa", CAUSAL)
    return known and attends(model) and config.seq_length <= window


def attends(model: nn.Module) -> bool:
    """Whether each layer attends, to all positions before or to a window of them."""
    return KINDS.issuperset(getattr(model.config, "layer_types", None) or KINDS)


def attend_causally(model: nn.Module, config: TrainConfig) -> None:
    """Attend without a mask where it would be causal only.

    transformers 5.23 also builds none then, but looks first for several sequences in a
    row, and in every forward the host waits for the device to answer.
    """
    if needs_no_mask(model, config):
        attend_without_mask(model)


def attend_without_mask(model: nn.Module) -> None:
    AttentionInterface.register(CAUSAL, sdpa_attention_forward)
    model.set_attn_implementation(CAUSAL)


def model_inputs(
    model: nn.Module, micro: dict[str, torch.Tensor], device: torch.device
) -> dict[str, torch.Tensor]:
    """A micro-batch on the device, with what keeps attention within documents.

    Where it has ``position_ids`` (batch, seq), a document begins at each 0. A model
    that makes masks sees this itself. One that makes none gets a mask for the whole
    rows, of which a tp rank may hold a share: (batch, 1, seq, seq), True to attend.
    """
    inputs = {k: v.to(device, non_blocking=True) for k, v in micro.items()}
    if "position_ids" in inputs and model.config._attn_implementation == CAUSAL:
        document = (inputs["position_ids"] == 0).cumsum(1)
        same = document.unsqueeze(1) == document.unsqueeze(2)
        inputs["attention_mask"] = same.tril().unsqueeze(1)
    return inputs


def check_documents(model: nn.Module, config: TrainConfig) -> None:
    """Refuse, in the driver, a model that cannot be told where documents begin.

    Raises:
        ConfigError: its positions are no input, or a layer carries a state along.
    """
    flash = (config.attn_implementation or "").startswith("flash")
    if flash and config.batch_size_per_gpu > 1:  # transformers 5.23 unpacks one row
        raise ConfigError(
            f"batch_size_per_gpu={config.batch_size_per_gpu} must be 1 for "
            f"{config.attn_implementation} to keep documents apart; try 1, with more "
            "gradient_accumulation_steps"
        )
    takes = "position_ids" in inspect.signature(model.forward).parameters
    if not (takes and attends(model)):
        raise ConfigError(
            f"pack={config.pack!r} must be left to models that tell documents apart by "
            f"their position_ids, which {type(model).__name__} does not; try 'stream' "
            "or 'none'"
        )


@torch.no_grad()
def check_apart(engine, config: TrainConfig) -> None:
    """Compare the loss of a document behind another with its loss in front of it.

    Every rank calls it before training, because a model may take position ids and a
    mask, and use neither.

    Raises:
        PlanError: the losses differ by more than rounding.
    """
    size = config.seq_length // 2
    if size < 2:
        return
    one = torch.arange(size) % 16 + 1
    other = one.flip(0)
    behind, before = (
        loss_of(engine, config, first, second, counted)
        for first, second, counted in ((one, other, 1), (other, one, 0))
    )
    half = next(engine.model.parameters()).dtype != torch.float32 or config.autocast
    if (behind - before).abs() > (5e-3 if half else 1e-5) * before.abs():
        raise PlanError(
            f"{engine.model.config.model_type} must not look from one document into "
            f"another, but a loss of {before:.6f} became {behind:.6f} behind another; "
            "try pack='stream' or 'none'"
        )


def loss_of(engine, config: TrainConfig, first, second, counted: int) -> torch.Tensor:
    """The loss of one of two documents in rows that hold both."""
    size, shape = len(first), (config.batch_size_per_gpu, config.seq_length)
    ids, positions = (torch.zeros(shape, dtype=torch.int64) for _ in range(2))
    ids[:, : 2 * size] = torch.cat([first, second])
    positions[:, : 2 * size] = torch.arange(size).repeat(2)
    labels = torch.full(shape, IGNORED)
    place = slice(counted * size + 1, (counted + 1) * size)
    labels[:, place] = ids[:, place]
    micro = {"input_ids": ids, "labels": labels, "position_ids": positions}
    engine.model.eval()
    loss = engine.summed_loss(micro).float()
    engine.model.train()
    return loss
