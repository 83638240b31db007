"""A dry run: one rank's training step, without memory, other ranks or weights."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack
from dataclasses import replace
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist

# Both are documented under these names; there are no public ones.
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from tp2d_lib import data, mesh
from tp2d_lib import model as models
from tp2d_lib.config import TrainConfig
from tp2d_lib.cost import comm, memory
from tp2d_lib.model.attention import attend_without_mask, flash_fits
from tp2d_lib.model.chunks import chunk_tokens

HELD = ("parameters", "gradients", "optimizer", "activations")
PHASES = ("forward", "backward", "update")


def predict(engine: str, config: TrainConfig) -> dict[str, int]:
    """What rank 0, which holds the largest share, will hold and send in a step.

    The engine's own code takes one step on fake tensors, which have a shape but no
    memory, in a fake process group, which sends nothing. It does so in a process of its
    own, so that none of this affects the caller.

    Args:
        engine: the module with the engine, "fsdp" or "autotp".
        config: ``device`` must be decided, because it decides the compute type.

    Returns:
        Bytes of ``parameters``, ``gradients``, ``optimizer`` and ``activations``; the
        peaks of ``forward``, ``backward`` and ``update`` once there is optimizer state;
        bytes sent over ``tp`` and ``dp``, and the part of the latter that
        ``dp_replicate`` is; ``model``, the number of parameters in the model.
    """
    with ProcessPoolExecutor(1, mp_context=get_context("forkserver")) as process:
        return process.submit(simulate, engine, config).result()


def report(
    config: TrainConfig, predicted: dict[str, int], rows: data.BatchLoader
) -> str:
    """The page a dry run prints: mesh, memory, traffic, data, steps."""
    ranks = mesh.layout(config.dp_size, config.tp_size)
    columns = "".join(f"{f'tp {tp}':>7}" for tp in range(config.tp_size))
    lines = [f"{len(ranks.flatten())} ranks on {config.device}", " " * 7 + columns]
    for dp, row in enumerate(ranks.tolist()):
        lines.append(f"{f'dp {dp}':>7}" + "".join(f"{rank:>7}" for rank in row))
    tokens = config.batch_size_per_gpu * config.seq_length
    steps = rows.steps_left
    return "\n".join(
        [
            *lines,
            f"parameters in the model: {predicted['model']:,}",
            "one rank holds",
            *(f"  {name:<12}{size(predicted[name]):>10}" for name in HELD),
            f"  activations: one micro-batch of {tokens:,} tokens",
            "peak per phase, with gathered weights, logits and buffers",
            *(f"  {name:<12}{size(predicted[name]):>10}" for name in PHASES),
            "  not counted: the allocator's reserve, CUDA's and NCCL's own memory",
            traffic(config, predicted),
            f"{rows.size:,} rows of {config.seq_length} tokens, "
            f"{int(rows.rows.lengths.sum()):,} tokens without padding",
            f"{steps:,} steps of {config.global_batch_size} rows, "
            f"{steps * config.global_batch_size / rows.size:.2f} epochs",
            *held_out(config),
        ]
    )


def peak(predicted: dict[str, int]) -> int:
    """The most bytes that exist on a rank at once."""
    return max(predicted[phase] for phase in PHASES)


def traffic(config: TrainConfig, predicted: dict[str, int]) -> str:
    tp, dp, copies = (size(predicted[name]) for name in ("tp", "dp", "dp_replicate"))
    between = f" ({copies} of it between the copies of the model)"
    return (
        f"one rank sends {tp} over tp and {dp} over dp"
        f"{between * (config.dp_replicate_size > 1)} in each step"
    )


def held_out(config: TrainConfig) -> list[str]:
    if not config.eval_every:
        return []
    rows = len(np.load(Path(config.prepared_eval_data) / "lengths.npy"))
    return [f"{rows:,} held-out rows, evaluated every {config.eval_every} steps"]


def as_cells(rows: Sequence[dict]) -> list[list[str]]:
    """A table's titles and values, from rows that have the same keys."""
    return [list(rows[0]), *([str(value) for value in row.values()] for row in rows)]


def aligned(cells: list[list[str]]) -> str:
    """Columns of text, the first row being their titles."""
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = [
        "  ".join(map(str.ljust, row, widths)).rstrip()
        for row in [cells[0], ["-" * width for width in widths], *cells[1:]]
    ]
    return "\n".join(lines)


def size(count: float) -> str:
    """A number of bytes in a suitable unit, such as 1.5 GB."""
    units = ["B", "kB", "MB", "GB", "TB"]
    while count >= 1000 and len(units) > 1:
        count /= 1000
        units.pop(0)
    return f"{count:.3g} {units[0]}"


def simulate(engine: str, config: TrainConfig) -> dict[str, int]:
    world_size = config.tp_size * config.dp_size
    os.environ.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE=str(world_size))
    os.environ["DS_ACCELERATOR"] = "cpu"  # before DeepSpeed is imported
    warnings.filterwarnings("ignore")

    dist.init_process_group("fake", rank=0, world_size=world_size)
    dtype, _ = models.pick_dtype(config, config.device)
    dtype = str(dtype).removeprefix("torch.")
    chunk = chunk_tokens(config, models.load_model_config(config).vocab_size)
    asked = config
    config = replace(
        config,
        device="cpu",
        dtype=dtype,
        loss_chunk_tokens=chunk,  # as on its own device
        attn_implementation=None,  # others have no kernels here
        compile=False,
        async_checkpoint=False,  # needs a real group, and a step writes none
    )
    grid = mesh.build_mesh(config.dp_size, config.tp_size, "cpu")
    with ExitStack() as stack:
        build, rank_bytes = {
            "fsdp": (fake_fsdp, memory.fsdp_rank_bytes),
            "autotp": (fake_autotp, memory.autotp_rank_bytes),
        }[engine]
        fake = FakeTensorMode(allow_non_fake_inputs=True)
        live = memory.LiveBytes(fake)  # entered last, it sees every operator first

        def enter_modes():
            for mode in (fake, FakeNumbers(), live):
                stack.enter_context(mode)

        built = build(config, grid, enter_modes)
        if built.model.config._attn_implementation == "sdpa":  # for sliding windows
            attend_without_mask(built.model)  # fake numbers make no mask
        built.gradients_checked = True  # exclude a collective of the first step only
        shape = (config.batch_size_per_gpu, config.seq_length)
        micro = {"input_ids": torch.zeros(shape, dtype=torch.long)}
        masks = not flash_fits(built.model, asked)
        if config.pack == "documents" and masks:
            micro["position_ids"] = micro["input_ids"]
        batch = [micro | {"labels": micro["input_ids"]}]
        batch *= config.gradient_accumulation_steps
        live.model = built.model
        held = rank_bytes(built, batch)
        sent = stack.enter_context(comm.CommBytes(grid, built.model))
        live.most.clear()  # the first step began without optimizer state
        built.step(batch)
    full = models.build_empty_model(config)
    return held | {
        "activations": live.activations,
        **{phase: live.most[phase] for phase in PHASES},
        "tp": sent.sent("tp"),
        "dp": sent.sent(*comm.DP),
        "dp_replicate": sent.sent("dp_replicate"),
        "model": sum(parameter.numel() for parameter in full.parameters()),
    }


def fake_fsdp(config: TrainConfig, grid, enter_modes: Callable):
    from tp2d_lib import fsdp  # here, as below: import only the engine used

    def load(model, config, device):
        enter_modes()
        model.to_empty(device=device)

    return fsdp.build_engine(config, grid, load=load)


def fake_autotp(config: TrainConfig, grid, enter_modes: Callable):
    from tp2d_lib import autotp
    from tp2d_lib.autotp.engine import init_deepspeed

    init_deepspeed(grid)
    patch_deepspeed(config)

    def load(config):
        model = models.build_empty_model(config)
        enter_modes()
        model.to_empty(device="cpu").tie_weights()
        model.to = lambda *_, **__: model  # fake weights cannot be replaced
        return model

    built = autotp.build_engine(config, grid, load=load)
    if config.tp_size > 1:  # this hook compares the tp ranks' inputs
        built.wrapped.first_dataloader_check.remove()
    return built


def patch_deepspeed(config: TrainConfig) -> None:
    """Supply what DeepSpeed's ranks would send each other, in this process only."""
    from deepspeed.accelerator import get_accelerator  # here: FSDP2 does not need it
    from deepspeed.runtime.zero import utils
    from deepspeed.sequence import cross_entropy
    from deepspeed.utils import groups

    groups._init_tp_mesh_device(config.tp_size)  # before the fake mode
    get_accelerator().is_fp16_supported = lambda: True  # as on GPUs
    utils.assert_lst_len_same_as_other_ranks = lambda numbers: None
    utils.get_lst_from_rank0 = lambda numbers: numbers
    vocabulary = models.load_model_config(config).vocab_size
    cross_entropy._resolve_vocab_metadata = lambda size, *_: (0, size, vocabulary)


class FakeNumbers(TorchDispatchMode):
    """Let ``item`` of fake tensors return 0, so that no check fires; 1.0 for floats."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.aten._local_scalar_dense.default:
            kind = args[0].dtype
            return 1.0 if kind.is_floating_point else 0
        return func(*args, **(kwargs or {}))
