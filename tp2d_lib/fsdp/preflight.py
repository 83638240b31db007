"""What the PyTorch engine can train, checked in the driver."""

from __future__ import annotations

from torch import nn
from torch.distributed.tensor import Placement, Replicate, Shard

from tp2d_lib.config import ConfigError, TrainConfig
from tp2d_lib.fsdp.plan import tensor_parallel_plan
from tp2d_lib.fsdp.whole import ComputeWhole, parts_left_whole
from tp2d_lib.model import PlanError, decoder_layers, headers
from tp2d_lib.model.attention import needs_no_mask
from tp2d_lib.model.blocks import STYLES, shardable


def check(config: TrainConfig, plan: bool = False) -> TrainConfig:
    """Find in the driver, before any worker starts, what cannot be trained.

    Args:
        config: with the device that the run will use.
        plan: look at the architecture only, as for a run that is not started here.

    Returns:
        The configuration for the workers: ``config``, unchanged.

    Raises:
        ConfigError: a value that the model, the data, the storage or the hardware does
            not allow, or a precision that only DeepSpeed trains in.
        PlanError: the model's plan does not cover it, or its files hold weights in
            parts.
    """
    from tp2d_lib.run import preflight  # here: it needs Ray, an engine does not

    check_precision(config)
    model, names = preflight.check(config, "fsdp", plan)
    stream = residual_stream(model, config)
    if config.tp_size > 1:
        check_plan(tensor_parallel_plan(model, stream), config)
    check_shared(model)
    combined = headers.own_state(model).keys() - names.keys()
    if combined:
        raise PlanError(
            f"the files of {config.model_name!r} must hold each weight as the model "
            f"does, but {min(combined)!r} is made of several; try DeepSpeed, which "
            "loads the full model"
        )
    return config


def check_plan(plan: dict, config: TrainConfig) -> None:
    """What is computed in full changes a layer's parameters while it is called."""
    whole = [name for name, style in plan.items() if isinstance(style, ComputeWhole)]
    if whole and config.compile:
        raise ConfigError(
            "compile=True works only with models of which every block is sharded over "
            f"tp, but {whole[0]!r} has others; try compile=False"
        )


def check_shared(model: nn.Module) -> None:
    """Layers must not share parameters, because each is sharded by itself.

    Raises:
        PlanError: names a parameter of two layers.
    """
    seen = set()
    for layer in decoder_layers(model):
        own = {parameter: name for name, parameter in layer.named_parameters()}
        if shared := seen & own.keys():
            name = min(own[parameter] for parameter in shared)
            raise PlanError(
                f"{name!r} must be a parameter of one layer, but several "
                f"layers of {type(model).__name__} share it; try DeepSpeed"
            )
        seen |= own.keys()


def residual_stream(model: nn.Module, config: TrainConfig) -> Placement:
    """How the tp ranks hold hidden states (batch, seq, hidden) between blocks.

    Each has seq / tp positions, or all of them where ``needs_all_positions`` says why.

    Raises:
        ConfigError: sequence parallelism is demanded of a model that makes masks, or
            the positions cannot be shared out equally.
    """
    why = needs_all_positions(model, config)
    if config.sequence_parallel == "always" and config.tp_size > 1 and why:
        raise ConfigError(
            "sequence_parallel='always' works only with models that attend without a "
            f"mask and gather nothing else, but {type(model).__name__} {why}; "
            "try 'auto'"
        )
    if why or config.sequence_parallel == "never":
        return Replicate()
    length, tp_size = config.seq_length, config.tp_size
    if length % tp_size:
        raise ConfigError(
            f"seq_length={length} must be divisible by tp_size={tp_size}, because "
            "between blocks each tp rank has an equal share of the positions; try "
            f"{max(length // tp_size, 1) * tp_size}, or sequence_parallel='never'"
        )
    return Shard(1)


def needs_all_positions(model: nn.Module, config: TrainConfig) -> str | None:
    """Why tp ranks cannot share out the positions between blocks, if they cannot."""
    if not needs_no_mask(model, config):
        return f"makes one for seq_length={config.seq_length}"
    if config.tp_size == 1:
        return None
    styles = shardable(model, STYLES)
    if parts_left_whole(model, styles):
        return "has blocks that each tp rank computes in full"
    # Ranks that hold different positions have random numbers of their own, and would
    # drop out differently where all of them compute the same.
    rates = [v for k, v in model.config.to_dict().items() if "drop" in k]
    if any("gather" in style for style in styles.values()) and any(
        isinstance(rate, float) and rate for rate in rates
    ):
        return "has dropout where each tp rank computes the same"
    return None


def check_precision(config: TrainConfig) -> None:
    if config.autocast and config.dtype not in ("auto", "bfloat16"):
        raise ConfigError(
            "autocast=True must be combined with bfloat16, not "
            f"dtype={config.dtype!r}; try dtype='auto'"
        )
    if config.dtype == "float16":
        raise ConfigError(
            "dtype='float16' works with DeepSpeed only, which scales the loss; try "
            "'bfloat16'"
        )
