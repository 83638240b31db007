"""The same training step written without this project, to be timed beside it.

A step has its ``model``, whose parameters know their meshes. Accelerate 1.15 has no
row: its ParallelismConfig refuses CPUs.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable

import torch
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    PrepareModuleInput,
    RowwiseParallel,
    SequenceParallel,
    loss_parallel,
    parallelize_module,
)
from transformers import AutoModelForCausalLM

from tp2d_lib.config import TrainConfig
from tp2d_lib.data import IGNORED
from tp2d_lib.mesh import build_mesh

COLUMNS = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
COLUMNS += ("mlp.gate_proj", "mlp.up_proj")
ROWS = ("self_attn.o_proj", "mlp.down_proj")
Step = Callable[[list[dict[str, torch.Tensor]]], None]


def load(config: TrainConfig, **options) -> nn.Module:
    name = config.model_name
    options = {"dtype": torch.float32, **options}
    return AutoModelForCausalLM.from_pretrained(name, **options).train()


def stepping(model: nn.Module, config: TrainConfig, **options) -> Step:
    """The loop that everyone writes."""
    options = {"fused": True} | options
    optimizer = torch.optim.AdamW(model.parameters(), config.learning_rate, **options)

    def step(batch: list[dict[str, torch.Tensor]]) -> None:
        model(**batch[0], use_cache=False).loss.backward()
        clip(list(model.parameters()), config.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad()

    step.model = model
    return step


def clip(parameters: list[nn.Parameter], max_norm: float) -> None:
    """As clip_grad_norm_, which refuses parameters on meshes that differ."""
    by_mesh = defaultdict(list)
    for parameter in parameters:
        by_mesh[getattr(parameter, "device_mesh", None)].append(parameter)
    norms = [nn.utils.get_total_norm(p.grad for p in own) for own in by_mesh.values()]
    norms = [n.full_tensor() if isinstance(n, DTensor) else n for n in norms]
    total = nn.utils.get_total_norm(norms)
    for own in by_mesh.values():
        nn.utils.clip_grads_with_norm_(own, max_norm, total)


def one_process(config: TrainConfig) -> Step:
    """transformers and torch's AdamW, with all cores."""
    return stepping(load(config), config)


def plain_pytorch(config: TrainConfig) -> Step:
    """PyTorch's tutorial on tensor parallelism with FSDP2, for models like Llama.

    https://docs.pytorch.org/tutorials/intermediate/TP_tutorial.html
    """
    mesh = build_mesh(config.dp_size, config.tp_size)
    model = load(config)
    gather = PrepareModuleInput(
        input_kwarg_layouts={"hidden_states": Shard(1)},
        desired_input_kwarg_layouts={"hidden_states": Replicate()},
    )
    block = {
        "input_layernorm": SequenceParallel(use_local_output=True),
        "post_attention_layernorm": SequenceParallel(use_local_output=True),
        "self_attn": gather,
        "mlp": PrepareModuleInput(
            input_layouts=Shard(1), desired_input_layouts=Replicate()
        ),
        **dict.fromkeys(COLUMNS, ColwiseParallel()),
        **dict.fromkeys(ROWS, RowwiseParallel(output_layouts=Shard(1))),
    }
    head = ColwiseParallel(
        input_layouts=Shard(1), output_layouts=Shard(-1), use_local_output=False
    )
    ends = {
        "model.embed_tokens": RowwiseParallel(
            input_layouts=Replicate(), output_layouts=Shard(1)
        ),
        "model.norm": SequenceParallel(use_local_output=True),
        "lm_head": head,
    }
    tied = model.lm_head.weight is model.model.embed_tokens.weight
    parallelize_module(model, mesh["tp"], ends)
    if tied:
        model.lm_head.weight = model.model.embed_tokens.weight
    for layer in model.model.layers:
        parallelize_module(layer, mesh["tp"], block)
        fully_shard(layer, mesh=mesh["dp"])
    fully_shard(model, mesh=mesh["dp"])
    step = stepping(model, config)

    def with_positions(batch: list[dict[str, torch.Tensor]]) -> None:
        length = batch[0]["input_ids"].shape[1]
        with loss_parallel():
            step([batch[0] | {"position_ids": torch.arange(length)[None]}])

    with_positions.model = model
    return with_positions


def published_loop(config: TrainConfig) -> Step:
    """The FSDP2 template of Ray's documentation: no vocabulary or sequence parallelism,
    an AdamW that updates one weight at a time, no clipping.

    https://docs.ray.io/en/latest/train/examples/pytorch/tensor_parallel_dtensor/README.html
    """
    mesh = build_mesh(config.dp_size, config.tp_size)
    model = load(config)
    plan = dict.fromkeys(COLUMNS, ColwiseParallel())
    plan |= dict.fromkeys(ROWS, RowwiseParallel())
    for layer in model.model.layers:
        parallelize_module(layer, mesh["tp"], plan)
        fully_shard(layer, mesh=mesh["dp"])
    fully_shard(model, mesh=mesh["dp"])
    optimizer = torch.optim.AdamW(
        model.parameters(), config.learning_rate, foreach=False
    )

    def step(batch: list[dict[str, torch.Tensor]]) -> None:
        optimizer.zero_grad()
        mask = (batch[0]["labels"] != IGNORED).long()
        loss = model(**batch[0], attention_mask=mask, use_cache=False).loss
        loss.backward()
        optimizer.step()
        loss.item()

    step.model = model
    return step


def transformers_distributed(config: TrainConfig) -> Step:
    """transformers shards the model itself, by its own plans."""
    from transformers.distributed import DistributedConfig

    sizes = DistributedConfig(tp_size=config.tp_size, fsdp_size=config.dp_size)
    return stepping(load(config, distributed_config=sizes), config)


def plain_deepspeed(config: TrainConfig) -> Step:
    """DeepSpeed as its documentation configures AutoTP with ZeRO 1."""
    import deepspeed

    from tp2d_lib.autotp.engine import init_deepspeed

    init_deepspeed(build_mesh(config.dp_size, config.tp_size))
    model = load(config)
    engine, *_ = deepspeed.initialize(
        model=model,
        optimizer=torch.optim.AdamW(model.parameters(), config.learning_rate),
        config={
            "train_micro_batch_size_per_gpu": config.batch_size_per_gpu,
            "gradient_clipping": config.max_grad_norm,
            "zero_optimization": {"stage": 1},
            "tensor_parallel": {"autotp_size": config.tp_size},
            "zero_allow_untested_optimizer": True,
            "steps_per_print": 10**9,
        },
    )

    def step(batch: list[dict[str, torch.Tensor]]) -> None:
        engine.backward(engine(**batch[0], use_cache=False).loss)
        engine.step()

    step.model = model
    return step
