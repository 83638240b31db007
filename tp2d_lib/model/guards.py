"""What both engines check: sizes, gradients, and that sharding changes no result."""

from __future__ import annotations

import inspect
import os
import shutil
from collections.abc import Mapping

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.tensor import DTensor
from transformers import PretrainedConfig

from tp2d_lib.config import ConfigError, TrainConfig
from tp2d_lib.model.architecture import device_type, load_model_config
from tp2d_lib.validation import UserError


class PlanError(UserError, ValueError):
    """The tensor-parallel plan does not cover the model; names what it leaves out."""


class NonFiniteError(RuntimeError):
    """A number that training cannot go on with: infinite, or not a number."""


def is_finite(tensor: torch.Tensor) -> torch.Tensor:
    """Whether a local tensor has no NaN or infinity, as a 0-d tensor: no device sync.

    Not ``isfinite().all()``, which takes as much memory again as the tensor.
    """
    if not tensor.numel():
        return torch.ones((), dtype=torch.bool, device=tensor.device)
    return torch.stack(tensor.aminmax()).isfinite().all()


def check_finite(tensors: Mapping[str, torch.Tensor], model: object) -> None:
    """Refuse weights from which only NaN could be trained.

    Args:
        tensors: by name; of a DTensor, this rank's part is looked at.
        model: where they were read from, for the message.

    Raises:
        NonFiniteError: names the first such tensor.
    """
    for name, tensor in tensors.items():
        if not is_finite(tensor.to_local() if isinstance(tensor, DTensor) else tensor):
            raise NonFiniteError(
                f"{name!r} in {str(model)!r} must be finite, but holds NaN or "
                "infinity; try an undamaged copy of the model"
            )


def check_sizes(config: TrainConfig) -> None:
    """Check what the model's ``config.json`` limits: heads, the longest sequence."""
    hf = load_model_config(config)
    query_heads = getattr(hf, "num_attention_heads", None)
    if not query_heads or hf.is_encoder_decoder:
        raise ConfigError(
            f"model_name={config.model_name!r} must be a decoder with attention heads, "
            f"not {hf.model_type!r}; try 'Qwen/Qwen2.5-0.5B'"
        )
    heads = getattr(hf, "num_key_value_heads", None) or query_heads
    if getattr(hf, "multi_query", False):
        heads = 1
    allowed = [n for n in range(1, heads + 1) if heads % n == query_heads % n == 0]
    if config.tp_size not in allowed:
        raise ConfigError(
            f"tp_size={config.tp_size} must divide the {heads} key-value heads and the "
            f"{query_heads} query heads of {config.model_name!r}; "
            f"try one of {', '.join(map(str, allowed))}"
        )
    longest = longest_sequence(hf)
    if longest and config.seq_length > longest:
        raise ConfigError(
            f"seq_length={config.seq_length} must be at most {longest}, the longest "
            f"sequence of {config.model_name!r}; try {longest}"
        )


def longest_sequence(hf: PretrainedConfig) -> int | None:
    """Tokens that the model has positions for, or None if there is no limit.

    Scaled rotary positions, such as YaRN's, reach ``factor`` times as far as those that
    the model was trained with at first; ``config.json`` may still have the old limit.
    """
    limit = getattr(hf, "max_position_embeddings", None)
    if limit is None or limit < 0:  # as XLNet says it
        return None
    scaling = getattr(hf, "rope_parameters", None) or {}
    first = scaling.get("original_max_position_embeddings") or limit
    factor = scaling.get("factor")
    return max(limit, int(first * factor)) if factor else limit


def check_loss(model: nn.Module, config: TrainConfig) -> None:
    """A loss is a sum over tokens, divided by a number that the caller gives.

    A router's is a mean over a micro-batch, and so is that of some decoders' own code.
    """
    must = f"model_name={config.model_name!r} must be a decoder"
    if getattr(model.config, "output_router_logits", False):
        raise ConfigError(
            f"{must} with no loss besides that of its tokens, but its config.json adds "
            "its router's; try a copy with output_router_logits=false"
        )
    if "loss_function" not in inspect.getsource(inspect.unwrap(type(model).forward)):
        raise ConfigError(
            f"{must} whose loss can count the tokens of the whole batch, but "
            f"{type(model).__name__} computes one of its own; try 'Qwen/Qwen2.5-0.5B'"
        )


def check_attention(config: TrainConfig) -> None:
    """On CPUs, flash attention has no kernel, and FlexAttention no backward pass."""
    chosen = config.attn_implementation
    if device_type(config) == "cpu" and chosen not in (None, "sdpa", "eager"):
        raise ConfigError(
            f"attn_implementation={chosen!r} must run on GPUs; try 'sdpa' on CPUs"
        )


def sliding_window(hf: PretrainedConfig) -> int | None:
    """Tokens a sliding-window layer looks back, or None if there is no such layer."""
    layers = getattr(hf, "layer_types", None)
    slides = "sliding_attention" in layers if layers else True
    return getattr(hf, "sliding_window", None) if slides else None


def check_compiler(config: TrainConfig) -> None:
    """On CPUs torch.compile generates C++, which must be compiled."""
    compilers = (os.environ.get("CXX", "g++"), "g++", "clang++")
    if (
        config.compile
        and device_type(config) == "cpu"
        and not any(map(shutil.which, compilers))
    ):
        raise ConfigError(
            "compile=True must find a C++ compiler, g++ or clang++, to train on a "
            "CPU; try compile=False"
        )


def check_replicated_gradients(gradients: dict[str, torch.Tensor], group) -> bool:
    """Compare the gradients of replicated parameters; a difference stops the run.

    A parameter used inside a sharded region gets a partial gradient. If it is not
    summed, the tp ranks silently drift apart; unequal gradients reveal this.

    Args:
        gradients: name -> this rank's gradient of a parameter replicated over tp.
        group: the tp process group.

    Returns:
        Whether they could be compared: in float16, the first ones may overflow.

    Raises:
        PlanError: names the parameter.
    """
    if not gradients:
        return True
    flat = torch.cat([g.detach().float().flatten() for g in gradients.values()])
    low, high = flat.clone(), flat.clone()
    dist.all_reduce(low, dist.ReduceOp.MIN, group=group)
    dist.all_reduce(high, dist.ReduceOp.MAX, group=group)
    if not (low.isfinite().all() and high.isfinite().all()):
        return False
    sizes = [g.numel() for g in gradients.values()]
    for name, lowest, highest in zip(
        gradients, low.split(sizes), high.split(sizes), strict=True
    ):
        apart = (highest - lowest).abs().max()
        if apart > 1e-3 * torch.maximum(highest.abs(), lowest.abs()).max():
            raise PlanError(
                f"the gradient of {name!r} must be the same on every tp rank, but "
                f"differs by {apart:.3g}: the plan leaves it partial; try tp_size=1"
            )
    return True


@torch.no_grad()
def probe(model: nn.Module) -> torch.Tensor:
    """The loss on a few fixed tokens, to detect whether sharding changed the model."""
    training, device = model.training, next(model.parameters()).device
    tokens = torch.arange(1, 17, device=device)[None]
    model.eval()
    loss = model(input_ids=tokens, labels=tokens, use_cache=False).loss
    model.train(training)
    return loss.float().cpu()


def check_same_function(
    before: torch.Tensor, after: torch.Tensor, allowed: float, description: str
) -> None:
    """Refuse sharding that passes all name and shape checks but changes the loss.

    Args:
        before, after: what ``probe`` returned before and after sharding.
        allowed: relative difference, the rounding of the compute type.
        description: of the sharded model, for the message.

    Raises:
        PlanError: the loss changed.
    """
    apart = (after - before).abs()
    if apart > allowed * before or apart.isnan():
        raise PlanError(
            f"the model {description} must compute what it did before, but a loss of "
            f"{before:.6f} became {after:.6f}; try a partition_config, or tp_size=1"
        )
