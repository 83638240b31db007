"""Causal attention: without a mask where it says no more, and within documents."""

from __future__ import annotations

import inspect
from contextlib import suppress

import torch
from torch import nn
from torch.nn.attention.varlen import varlen_attn
from transformers import AttentionInterface, PretrainedConfig
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from tp2d_lib.config import ConfigError, TrainConfig
from tp2d_lib.model.architecture import device_type, pick_dtype
from tp2d_lib.model.guards import PlanError, sliding_window

CAUSAL = "tp2d_causal"  # sdpa, for which transformers makes no masks
PROBED = "tp2d_probed"  # reports what it is given
VARLEN = "tp2d_varlen"  # FlashAttention within documents, which needs none either
# torch 2.11 takes fewer heads of keys than of queries unasked.
ASKED = "enable_gqa" in inspect.signature(varlen_attn).parameters
GQA = {"enable_gqa": True} if ASKED else {}
KINDS = {"full_attention", "sliding_attention"}
IGNORED = -100  # label of a position that does not count, as in torch and transformers


def needs_no_mask(model: nn.Module, config: TrainConfig) -> bool:
    """Whether attention is causal and no more: a mask would say nothing else."""
    hf = model.config
    if hf._attn_implementation == CAUSAL:
        return True
    window = sliding_window(hf) or config.seq_length
    possible = hf._attn_implementation == "sdpa" and attends(model)
    return possible and config.seq_length <= window and is_plainly_causal(model)


class Reached(Exception):
    """The model has come to its first attention."""


@torch.no_grad()
def is_plainly_causal(model: nn.Module) -> bool:
    """Whether attention given no mask is causal: a model may make a mask of its own.

    Doge adds one, and relies on the causal one to be part of it. The model, which may
    be empty, is called up to its first attention only.
    """
    reached = []

    def look(module, query, key, value, attention_mask=None, **kwargs):
        is_causal = kwargs.get("is_causal")
        if is_causal is None:
            is_causal = getattr(module, "is_causal", True)
        reached.append(attention_mask is None and bool(is_causal))
        raise Reached

    own = model.config._attn_implementation
    AttentionInterface.register(PROBED, look)
    model.set_attn_implementation(PROBED)
    tokens = torch.zeros(1, 2, dtype=torch.long, device=model.device)
    with suppress(Exception):  # before attention: then nothing is known of it
        model(input_ids=tokens, use_cache=False)
    model.set_attn_implementation(own)
    return reached == [True]


def attends(model: nn.Module) -> bool:
    """Whether each layer attends, to all positions before or to a window of them."""
    return KINDS.issuperset(getattr(model.config, "layer_types", None) or KINDS)


def attend_causally(model: nn.Module, config: TrainConfig) -> None:
    """Attend without a mask where it would be causal only.

    transformers 5.24 also builds none then, but looks first for several sequences in a
    row, and in every forward the host waits for the device to answer.
    """
    if needs_no_mask(model, config):
        attend_without_mask(model)
        if flash_fits(model, config):
            model.set_attn_implementation(VARLEN)


def attend_without_mask(model: nn.Module) -> None:
    AttentionInterface.register(CAUSAL, sdpa_attention_forward)
    AttentionInterface.register(VARLEN, attend_within_documents)
    model.set_attn_implementation(CAUSAL)


def flash_fits(model: nn.Module, config: TrainConfig) -> bool:
    """Whether PyTorch's FlashAttention can compute packed documents, and may."""
    if config.pack != "documents" or device_type(config) != "cuda":
        return False
    hf = model.config
    if hf.to_dict().get("per_layer_config"):  # heads of several sizes
        return False
    size = getattr(hf, "head_dim", None) or hf.hidden_size // hf.num_attention_heads
    half = pick_dtype(config, "cuda")[0] in (torch.bfloat16, torch.float16)
    fits = size % 8 == 0 and size <= 256 and not drops(hf)
    return half and fits and config.attn_implementation is None


def drops(hf: PretrainedConfig) -> bool:
    """Whether attention has dropout, which each family calls by another name."""
    settings = hf.to_dict().items()
    return any(value for name, value in settings if "drop" in name and "att" in name)


def attend_within_documents(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: None,
    scaling: float | None = None,
    cu_seq_lens_q: torch.Tensor | None = None,
    max_length_q: int | None = None,
    **kwargs,
) -> tuple[torch.Tensor, None]:
    """Causal attention of rows, (batch, heads, seq, head size), that hold documents."""
    rows, _, seq, _ = query.shape
    # Under autocast, which does not know the kernel, rotary embeddings are float32.
    query, key = (x.to(value.dtype) for x in (query, key))
    packed = (x.transpose(1, 2).flatten(0, 1) for x in (query, key, value))
    bounds = (cu_seq_lens_q, cu_seq_lens_q, max_length_q, max_length_q)
    out = varlen_attn(*packed, *bounds, scale=scaling, window_size=(-1, 0), **GQA)
    return out.unflatten(0, (rows, seq)), None


def model_inputs(
    model: nn.Module, micro: dict[str, torch.Tensor], device: torch.device
) -> dict[str, torch.Tensor]:
    """A micro-batch on the device, with what keeps attention within documents.

    Where it has ``position_ids`` (batch, seq), a document begins at each 0. A model
    that makes masks sees this itself. One that makes none gets, for the whole rows, of
    which a tp rank may hold a share, where documents begin, or else a mask: (batch, 1,
    seq, seq), True to attend.
    """
    inputs = {k: v.to(device, non_blocking=True) for k, v in micro.items()}
    chosen, positions = model.config._attn_implementation, micro.get("position_ids")
    if chosen == VARLEN:
        if positions is None:  # held-out rows of text: each is one document
            ids = micro["input_ids"]
            positions = torch.arange(ids.shape[1]).expand_as(ids)
        starts, longest = document_starts(positions)
        inputs["cu_seq_lens_q"] = starts.to(device, non_blocking=True)
        inputs["max_length_q"] = longest
    elif positions is not None and chosen == CAUSAL:
        document = (inputs["position_ids"] == 0).cumsum(1)
        same = document.unsqueeze(1) == document.unsqueeze(2)
        inputs["attention_mask"] = same.tril().unsqueeze(1)
    return inputs


def document_starts(positions: torch.Tensor) -> tuple[torch.Tensor, int]:
    """Where documents begin in rows laid end to end, and how long one is at most.

    The first is int32, and ends with the number of tokens; the second is rounded up to
    a power of two, so that compiled code meets few of them.
    """
    starts = (positions.flatten() == 0).nonzero().flatten()
    starts = torch.cat([starts, starts.new_tensor([positions.numel()])])
    longest = int(starts.diff().max())
    return starts.int(), 1 << (longest - 1).bit_length()


def check_documents(model: nn.Module, config: TrainConfig) -> None:
    """Refuse, in the driver, a model that cannot be told where documents begin.

    Raises:
        ConfigError: its positions are no input, or a layer carries a state along.
    """
    flash = (config.attn_implementation or "").startswith("flash")
    if flash and config.batch_size_per_gpu > 1:  # transformers 5.24 unpacks one row
        raise ConfigError(
            f"batch_size_per_gpu={config.batch_size_per_gpu} must be 1 for "
            f"{config.attn_implementation} to keep documents apart; try 1, with more "
            "gradient_accumulation_steps"
        )
    takes = "position_ids" in inspect.signature(model.forward).parameters
    if not (takes and attends(model)):
        raise ConfigError(
            f"pack={config.pack!r} works only with models that tell documents apart by "
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
    half = pick_dtype(config, engine.device.type)[0] != torch.float32
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
