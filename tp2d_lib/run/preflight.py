"""What both ``check`` functions begin with: model, data, storage, hardware."""

from __future__ import annotations

from torch import nn

from tp2d_lib import data
from tp2d_lib.checkpoint import resume, storage
from tp2d_lib.config import TrainConfig
from tp2d_lib.model import attention, build_empty_model, guards, headers
from tp2d_lib.model.recompute import check_recomputed
from tp2d_lib.run import evaluate


def check(
    config: TrainConfig, engine: str, plan: bool = False
) -> tuple[nn.Module, dict]:
    """Find in the driver, before any worker starts, what does not fit together.

    Args:
        config: with the device that the run will use.
        engine: its name in the manifest of a checkpoint, "fsdp" or "autotp".
        plan: look at the architecture only, as for a run that is not started here.

    Returns:
        The empty model, and the names in its files, by the model's own; in a plan
        they are the model's.

    Raises:
        ConfigError: one sentence: the field, the value, the rule, a value that works.
    """
    guards.check_sizes(config)
    guards.check_compiler(config)
    guards.check_attention(config)
    model = build_empty_model(config)
    guards.check_loss(model, config)
    check_recomputed(model, config)
    if plan:
        return model, {name: name for name in model.state_dict()}
    stored = headers.read(config)
    storage.check(config)
    names = headers.check(model, stored, config)
    each = 12 if config.optimizer == "adamw" else 4  # float32, and AdamW's two moments
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    storage.check_space(config, each * trained)
    resume.check_engine(engine, config)
    if "documents" in (data.check(config), evaluate.check(config)):
        attention.check_documents(model, config)
    return model, names
